// Each backward stage's Params from the keyword arguments of a call. The names are those of the fields.
#pragma once

#include "arguments.h"
#include "blend_bwd.h"
#include "color_bwd.h"
#include "composite_bwd.h"
#include "project_bwd.h"
#include "stage_arguments.h"

namespace rapfast {

template <typename T>
ProjectBwdParams<T> read_project_bwd(Arguments& a) {
  ProjectBwdParams<T> p;
  read_scene_sizes(a, p);
  p.width = a.get<int32_t>("width");
  p.height = a.get<int32_t>("height");
  p.camera_model = static_cast<CameraModel>(a.get<int32_t>("camera_model"));
  p.antialiased = a.get<bool>("antialiased");
  p.dense_means2d = a.get<bool>("dense_means2d");
  p.eps2d = T(a.get<double>("eps2d"));
  read_geometry(a, p);
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
  read_scene_sizes(a, p);
  read_color_form(a, p);
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
  read_blend_inputs(a, p);
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
  read_composite_sizes(a, p);
  read_composite_form(a, p);
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
