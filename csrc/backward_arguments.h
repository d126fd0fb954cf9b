// Each backward stage's Params from the keyword arguments of a call. The names are those of the fields.
#pragma once

#include "arguments.h"
#include "blend_bwd.h"
#include "color_bwd.h"
#include "composite_bwd.h"
#include "project_bwd.h"

namespace rapfast {

template <typename T>
ProjectBwdParams<T> read_project_bwd(Arguments& a) {
  ProjectBwdParams<T> p;
  p.n_scenes = a.get<int64_t>("n_scenes");
  p.n_cameras = a.get<int64_t>("n_cameras");
  p.n_gaussians = a.get<int64_t>("n_gaussians");
  p.width = a.get<int32_t>("width");
  p.height = a.get<int32_t>("height");
  p.camera_model = static_cast<CameraModel>(a.get<int32_t>("camera_model"));
  p.antialiased = a.get<bool>("antialiased");
  p.dense_means2d = a.get<bool>("dense_means2d");
  p.eps2d = T(a.get<double>("eps2d"));
  p.means = a.pointer<const T>("means");
  p.quats = a.pointer<const T>("quats");
  p.scales = a.pointer<const T>("scales");
  p.covars = a.pointer<const T>("covars");
  p.opacities = a.pointer<const T>("opacities");
  p.viewmats = a.pointer<const T>("viewmats");
  p.Ks = a.pointer<const T>("Ks");
  p.gaussian_ids = a.pointer<const int32_t>("gaussian_ids");
  p.image_offsets = a.pointer<const int64_t>("image_offsets");
  p.v_records = a.pointer<const Record<T>>("v_records");
  p.v_means2d = a.pointer<const T>("v_means2d");
  p.v_means = a.pointer<T>("v_means");
  p.v_quats = a.pointer<T>("v_quats");
  p.v_scales = a.pointer<T>("v_scales");
  p.v_covars = a.pointer<T>("v_covars");
  p.v_opacities = a.pointer<T>("v_opacities");
  p.v_viewmats = a.pointer<T>("v_viewmats");
  p.v_Ks = a.pointer<T>("v_Ks");
  return p;
}

template <typename T>
ColorBwdParams<T> read_color_bwd(Arguments& a) {
  ColorBwdParams<T> p;
  p.n_scenes = a.get<int64_t>("n_scenes");
  p.n_cameras = a.get<int64_t>("n_cameras");
  p.n_gaussians = a.get<int64_t>("n_gaussians");
  p.sh_degree = a.get<int32_t>("sh_degree");
  p.n_bases = a.get<int64_t>("n_bases");
  p.n_channels = a.get<int64_t>("n_color_channels");
  p.per_camera = a.get<bool>("per_camera");
  p.depth_channel = static_cast<DepthChannel>(a.get<int32_t>("depth_channel"));
  p.means = a.pointer<const T>("means");
  p.viewmats = a.pointer<const T>("viewmats");
  p.colors = a.pointer<const T>("colors");
  p.gaussian_ids = a.pointer<const int32_t>("gaussian_ids");
  p.image_offsets = a.pointer<const int64_t>("image_offsets");
  p.records = a.pointer<const Record<T>>("records");
  p.v_record_colors = a.pointer<const T>("v_record_colors");
  p.color_stride = a.get<int64_t>("color_stride");
  p.v_means = a.pointer<T>("v_means");
  p.v_viewmats = a.pointer<T>("v_viewmats");
  p.v_colors = a.pointer<T>("v_colors");
  p.v_depths = a.pointer<T>("v_depths");
  return p;
}

template <typename T>
BlendBwdParams<T> read_blend_bwd(Arguments& a) {
  BlendBwdParams<T> p;
  p.n_images = a.get<int64_t>("n_images");
  p.width = a.get<int32_t>("width");
  p.height = a.get<int32_t>("height");
  p.tiles_x = a.get<int32_t>("tiles_x");
  p.tiles_y = a.get<int32_t>("tiles_y");
  p.n_channels = a.get<int64_t>("n_channels");
  p.alpha_cap = T(a.get<double>("alpha_cap"));
  p.records = a.pointer<const Record<T>>("records");
  p.record_colors = a.pointer<const T>("record_colors");
  p.color_stride = a.get<int64_t>("color_stride");
  p.image_offsets = a.pointer<const int64_t>("image_offsets");
  p.tile_offsets = a.pointer<const int64_t>("tile_offsets");
  p.tile_records = a.pointer<const int32_t>("tile_records");
  p.v_colors = a.pointer<const T>("v_colors");
  p.v_alphas = a.pointer<const T>("v_alphas");
  p.v_records = a.pointer<Record<T>>("v_records");
  p.v_record_colors = a.pointer<T>("v_record_colors");
  p.v_means2d_abs = a.pointer<T>("v_means2d_abs");
  return p;
}

template <typename T>
CompositeBwdParams<T> read_composite_bwd(Arguments& a) {
  CompositeBwdParams<T> p;
  p.n_images = a.get<int64_t>("n_images");
  p.width = a.get<int32_t>("width");
  p.height = a.get<int32_t>("height");
  p.out_width = a.get<int32_t>("out_width");
  p.out_height = a.get<int32_t>("out_height");
  p.n_channels = a.get<int64_t>("n_channels");
  p.n_color_channels = a.get<int64_t>("n_color_channels");
  p.expected_depth = a.get<bool>("expected_depth");
  p.clamp = a.get<bool>("clamp");
  p.channels_first = a.get<bool>("channels_first");
  p.clamp_min = T(a.get<double>("clamp_min"));
  p.clamp_max = T(a.get<double>("clamp_max"));
  p.background_kind = static_cast<BackgroundKind>(a.get<int32_t>("background_kind"));
  p.colors = a.pointer<const T>("colors");
  p.alphas = a.pointer<const T>("alphas");
  p.backgrounds = a.pointer<const T>("backgrounds");
  p.std = a.pointer<const T>("std");
  p.v_out = a.pointer<const T>("v_out");
  p.v_out_alphas = a.pointer<const T>("v_out_alphas");
  p.v_colors = a.pointer<T>("v_colors");
  p.v_alphas = a.pointer<T>("v_alphas");
  p.v_backgrounds = a.pointer<T>("v_backgrounds");
  return p;
}

}  // namespace rapfast
