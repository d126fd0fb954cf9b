// Each stage's Params from the keyword arguments of a call. The names are those of the fields.
#pragma once

#include "arguments.h"
#include "bin.h"
#include "blend.h"
#include "color.h"
#include "color_net.h"
#include "composite.h"
#include "project.h"

namespace rapfast {

// The parts that several Params have, a stage's and its backward's among them, are read by one function each.

template <typename T, template <typename> class Params>
void read_scene_sizes(Arguments& a, Params<T>& p) {
  p.n_scenes = a.get<int64_t>("n_scenes");
  p.n_cameras = a.get<int64_t>("n_cameras");
  p.n_gaussians = a.get<int64_t>("n_gaussians");
}

template <typename T, template <typename> class Params>
void read_geometry(Arguments& a, Params<T>& p) {
  p.means = a.pointer<const T>("means");
  p.quats = a.pointer<const T>("quats");
  p.scales = a.pointer<const T>("scales");
  p.covars = a.pointer<const T>("covars");
  p.opacities = a.pointer<const T>("opacities");
  p.viewmats = a.pointer<const T>("viewmats");
  p.Ks = a.pointer<const T>("Ks");
}

// Sizes and options of the projection; the rest are addresses.
template <typename T>
void read_project_form(Arguments& a, ProjectParams<T>& p) {
  read_scene_sizes(a, p);
  p.options.width = a.get<int32_t>("width");
  p.options.height = a.get<int32_t>("height");
  p.options.camera_model = static_cast<CameraModel>(a.get<int32_t>("camera_model"));
  p.options.antialiased = a.get<bool>("antialiased");
  p.options.eps2d = T(a.get<double>("eps2d"));
  p.options.near_plane = T(a.get<double>("near_plane"));
  p.options.far_plane = T(a.get<double>("far_plane"));
  p.options.radius_clip = T(a.get<double>("radius_clip"));
}

template <typename T>
ProjectParams<T> read_project(Arguments& a) {
  ProjectParams<T> p;
  read_project_form(a, p);
  read_geometry(a, p);
  p.capacity = a.get<int64_t>("capacity");
  p.records = a.pointer<Record<T>>("records");
  p.radii = a.pointer<int32_t>("radii");
  p.gaussian_ids = a.pointer<int32_t>("gaussian_ids");
  p.image_offsets = a.pointer<int64_t>("image_offsets");
  p.n_invalid = a.pointer<int64_t>("n_invalid");
  return p;
}

template <typename T, template <typename> class Params>
void read_color_form(Arguments& a, Params<T>& p) {
  p.sh_degree = a.get<int32_t>("sh_degree");
  p.n_bases = a.get<int64_t>("n_bases");
  p.n_channels = a.get<int64_t>("n_color_channels");
  p.per_camera = a.get<bool>("per_camera");
  p.depth_channel = static_cast<DepthChannel>(a.get<int32_t>("depth_channel"));
}

template <typename T>
ColorParams<T> read_color(Arguments& a) {
  ColorParams<T> p;
  read_scene_sizes(a, p);
  p.width = a.get<int32_t>("width");
  p.height = a.get<int32_t>("height");
  p.means = a.pointer<const T>("means");
  p.viewmats = a.pointer<const T>("viewmats");
  p.Ks = a.pointer<const T>("Ks");
  read_color_form(a, p);
  p.shared = a.get<bool>("shared_colors");
  p.colors = a.pointer<const T>("colors");
  p.capacity = a.get<int64_t>("capacity");
  p.color_stride = a.get<int64_t>("color_stride");
  p.gaussian_ids = a.pointer<const int32_t>("gaussian_ids");
  p.image_offsets = a.pointer<const int64_t>("image_offsets");
  p.records = a.pointer<Record<T>>("records");
  p.record_colors = a.pointer<T>("record_colors");
  p.n_invalid = a.pointer<int64_t>("n_invalid");
  return p;
}

// A colour network but for its ColorParams. `layers` is the address of int64 [n_layers, 6]: the fields
// of NetLayer in their order. Its sh_degree is called net_sh_degree here, its views net_views.
template <typename T>
void read_net_form(Arguments& a, ColorNetParams<T>& p) {
  p.input = static_cast<NetInput>(a.get<int32_t>("input"));
  p.output = static_cast<NetOutput>(a.get<int32_t>("output"));
  p.half = a.get<bool>("half");
  p.n_inputs = a.get<int32_t>("n_inputs");
  p.n_outputs = a.get<int32_t>("n_outputs");
  p.sh_degree = a.get<int32_t>("net_sh_degree");
  p.n_layers = a.get<int32_t>("n_layers");
  const int64_t* fields = a.pointer<const int64_t>("layers");
  for (int32_t i = 0; i < p.n_layers; ++i, fields += 6) {
    p.layers[i] = {int32_t(fields[0]), int32_t(fields[1]), int32_t(fields[2]),
                   fields[3],          fields[4],          fields[5]};
  }
  p.weights = a.pointer<const void>("weights");
  p.biases = a.pointer<const T>("biases");
  p.base = a.pointer<const void>("base");
  p.base_stride = a.get<int64_t>("base_stride");
  p.views = a.pointer<const NetView>("net_views");
  p.box_coord = a.pointer<const T>("box_coord");
  p.coord_scale = T(a.get<double>("coord_scale"));
  p.features = a.pointer<const T>("features");
  p.per_camera_features = a.get<bool>("per_camera_features");
}

template <typename T>
ColorNetParams<T> read_color_net(Arguments& a) {
  ColorNetParams<T> p;
  p.color = read_color<T>(a);
  read_net_form(a, p);
  return p;
}

template <typename T>
BinParams<T> read_bin(Arguments& a) {
  BinParams<T> p;
  p.n_images = a.get<int64_t>("n_images");
  p.tiles_x = a.get<int32_t>("tiles_x");
  p.tiles_y = a.get<int32_t>("tiles_y");
  p.first_tile_row = a.get<int32_t>("first_tile_row");
  p.record_capacity = a.get<int64_t>("record_capacity");
  p.capacity = a.get<int64_t>("capacity");
  p.records = a.pointer<const Record<T>>("records");
  p.radii = a.pointer<const int32_t>("radii");
  p.image_offsets = a.pointer<const int64_t>("image_offsets");
  p.tile_offsets = a.pointer<int64_t>("tile_offsets");
  p.tile_records = a.pointer<int32_t>("tile_records");
  return p;
}

// What is blended.
template <typename T, template <typename> class Params>
void read_blend_inputs(Arguments& a, Params<T>& p) {
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
}

template <typename T>
BlendParams<T> read_blend(Arguments& a) {
  BlendParams<T> p;
  read_blend_inputs(a, p);
  p.colors = a.pointer<T>("colors");
  p.alphas = a.pointer<T>("alphas");
  return p;
}

// What composite does to an image, addresses and pixel type aside.
template <typename T, template <typename> class Params>
void read_composite_form(Arguments& a, Params<T>& p) {
  p.out_width = a.get<int32_t>("out_width");
  p.out_height = a.get<int32_t>("out_height");
  p.expected_depth = a.get<bool>("expected_depth");
  p.clamp = a.get<bool>("clamp");
  p.channels_first = a.get<bool>("channels_first");
  p.clamp_min = T(a.get<double>("clamp_min"));
  p.clamp_max = T(a.get<double>("clamp_max"));
  p.background_kind = static_cast<BackgroundKind>(a.get<int32_t>("background_kind"));
}

template <typename T>
void read_composite_options(Arguments& a, CompositeParams<T>& p) {
  read_composite_form(a, p);
  p.pixel_type = static_cast<PixelType>(a.get<int32_t>("pixel_type"));
}

template <typename T, template <typename> class Params>
void read_composite_sizes(Arguments& a, Params<T>& p) {
  p.n_images = a.get<int64_t>("n_images");
  p.width = a.get<int32_t>("width");
  p.height = a.get<int32_t>("height");
  p.n_channels = a.get<int64_t>("n_channels");
  p.n_color_channels = a.get<int64_t>("n_color_channels");
}

template <typename T>
CompositeParams<T> read_composite(Arguments& a) {
  CompositeParams<T> p;
  read_composite_sizes(a, p);
  p.colors = a.pointer<const T>("colors");
  p.alphas = a.pointer<const T>("alphas");
  read_composite_options(a, p);
  p.backgrounds = a.pointer<const T>("backgrounds");
  p.mean = a.pointer<const T>("mean");
  p.std = a.pointer<const T>("std");
  p.out = a.pointer<void>("out");
  p.out_alphas = a.pointer<T>("out_alphas");
  return p;
}

}  // namespace rapfast
