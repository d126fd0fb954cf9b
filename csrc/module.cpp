// rapfast._C: the stages for Python. It checks nothing and allocates nothing: rapfast/ops does both.
// Pointers arrive as integers (0: absent), every argument by name. The GIL is released while a stage
// runs. `bits` is 32 or 64: the floating type of all parameters of the call.
#include <pybind11/pybind11.h>

#include "bin.h"
#include "blend.h"
#include "color.h"
#include "composite.h"
#include "info.h"
#include "project.h"

namespace py = pybind11;
using namespace rapfast;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls run(float{}) or run(double{}) without the GIL.
template <typename Run>
void dispatch(int bits, Run&& run) {
  py::gil_scoped_release release;
  if (bits == 64) {
    run(double{});
  } else {
    run(float{});
  }
}

void project(int bits, int threads, int64_t n_scenes, int64_t n_cameras, int64_t n_gaussians,
             int64_t capacity, int32_t width, int32_t height, int32_t camera_model, bool antialiased,
             double eps2d, double near_plane, double far_plane, double radius_clip, Address means,
             Address quats, Address scales, Address covars, Address opacities, Address viewmats,
             Address Ks, Address records, Address radii, Address gaussian_ids, Address image_offsets,
             Address n_invalid) {
  dispatch(bits, [&](auto zero) {
    using T = decltype(zero);
    ProjectParams<T> p;
    p.n_scenes = n_scenes;
    p.n_cameras = n_cameras;
    p.n_gaussians = n_gaussians;
    p.capacity = capacity;
    p.options = {width,        height,         static_cast<CameraModel>(camera_model),
                 antialiased,  T(eps2d),       T(near_plane),
                 T(far_plane), T(radius_clip)};
    p.means = at<T>(means);
    p.quats = at<T>(quats);
    p.scales = at<T>(scales);
    p.covars = at<T>(covars);
    p.opacities = at<T>(opacities);
    p.viewmats = at<T>(viewmats);
    p.Ks = at<T>(Ks);
    p.records = at<Record<T>>(records);
    p.radii = at<int32_t>(radii);
    p.gaussian_ids = at<int32_t>(gaussian_ids);
    p.image_offsets = at<int64_t>(image_offsets);
    p.n_invalid = at<int64_t>(n_invalid);
    project_cpu(p, threads);
  });
}

void color(int bits, int threads, int64_t n_scenes, int64_t n_cameras, int64_t n_gaussians,
           int32_t width, int32_t height, int32_t sh_degree, int64_t n_bases, int64_t n_channels,
           bool per_camera, int32_t depth_channel, Address means, Address viewmats, Address Ks,
           Address colors, Address gaussian_ids, Address image_offsets, Address records,
           Address record_colors, Address n_invalid) {
  dispatch(bits, [&](auto zero) {
    using T = decltype(zero);
    ColorParams<T> p;
    p.n_scenes = n_scenes;
    p.n_cameras = n_cameras;
    p.n_gaussians = n_gaussians;
    p.width = width;
    p.height = height;
    p.sh_degree = sh_degree;
    p.n_bases = n_bases;
    p.n_channels = n_channels;
    p.per_camera = per_camera;
    p.depth_channel = static_cast<DepthChannel>(depth_channel);
    p.means = at<T>(means);
    p.viewmats = at<T>(viewmats);
    p.Ks = at<T>(Ks);
    p.colors = at<T>(colors);
    p.gaussian_ids = at<int32_t>(gaussian_ids);
    p.image_offsets = at<int64_t>(image_offsets);
    p.records = at<Record<T>>(records);
    p.record_colors = at<T>(record_colors);
    p.n_invalid = at<int64_t>(n_invalid);
    color_cpu(p, threads);
  });
}

void bin(int bits, int threads, int64_t n_images, int32_t tiles_x, int32_t tiles_y, int64_t capacity,
         Address records, Address radii, Address image_offsets, Address tile_offsets,
         Address tile_records) {
  dispatch(bits, [&](auto zero) {
    using T = decltype(zero);
    BinParams<T> p;
    p.n_images = n_images;
    p.tiles_x = tiles_x;
    p.tiles_y = tiles_y;
    p.capacity = capacity;
    p.records = at<Record<T>>(records);
    p.radii = at<int32_t>(radii);
    p.image_offsets = at<int64_t>(image_offsets);
    p.tile_offsets = at<int64_t>(tile_offsets);
    p.tile_records = at<int32_t>(tile_records);
    bin_cpu(p, threads);
  });
}

void blend(int bits, int threads, int64_t n_images, int32_t width, int32_t height, int32_t tiles_x,
           int32_t tiles_y, int64_t n_channels, double alpha_cap, Address records,
           Address record_colors, Address image_offsets, Address tile_offsets, Address tile_records,
           Address colors, Address alphas) {
  dispatch(bits, [&](auto zero) {
    using T = decltype(zero);
    BlendParams<T> p;
    p.n_images = n_images;
    p.width = width;
    p.height = height;
    p.tiles_x = tiles_x;
    p.tiles_y = tiles_y;
    p.n_channels = n_channels;
    p.alpha_cap = T(alpha_cap);
    p.records = at<Record<T>>(records);
    p.record_colors = at<T>(record_colors);
    p.image_offsets = at<int64_t>(image_offsets);
    p.tile_offsets = at<int64_t>(tile_offsets);
    p.tile_records = at<int32_t>(tile_records);
    p.colors = at<T>(colors);
    p.alphas = at<T>(alphas);
    blend_cpu(p, threads);
  });
}

void composite(int bits, int threads, int64_t n_images, int32_t width, int32_t height,
               int32_t out_width, int32_t out_height, int64_t n_channels, int64_t n_color_channels,
               bool expected_depth, bool clamp, bool channels_first, double clamp_min,
               double clamp_max, int32_t background_kind, int32_t pixel_type, Address colors,
               Address alphas, Address backgrounds, Address mean, Address std, Address out,
               Address out_alphas) {
  dispatch(bits, [&](auto zero) {
    using T = decltype(zero);
    CompositeParams<T> p;
    p.n_images = n_images;
    p.width = width;
    p.height = height;
    p.out_width = out_width;
    p.out_height = out_height;
    p.n_channels = n_channels;
    p.n_color_channels = n_color_channels;
    p.expected_depth = expected_depth;
    p.clamp = clamp;
    p.channels_first = channels_first;
    p.clamp_min = T(clamp_min);
    p.clamp_max = T(clamp_max);
    p.background_kind = static_cast<BackgroundKind>(background_kind);
    p.pixel_type = static_cast<PixelType>(pixel_type);
    p.colors = at<T>(colors);
    p.alphas = at<T>(alphas);
    p.backgrounds = at<T>(backgrounds);
    p.mean = at<T>(mean);
    p.std = at<T>(std);
    p.out = at<void>(out);
    p.out_alphas = at<T>(out_alphas);
    composite_cpu(p, threads);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "rapfast's stages on raw memory. Call them through rapfast.ops.";
  bind_info(m);

  m.def("project", &project, py::kw_only(), py::arg("bits"), py::arg("threads"), py::arg("n_scenes"),
        py::arg("n_cameras"), py::arg("n_gaussians"), py::arg("capacity"), py::arg("width"),
        py::arg("height"), py::arg("camera_model"), py::arg("antialiased"), py::arg("eps2d"),
        py::arg("near_plane"), py::arg("far_plane"), py::arg("radius_clip"), py::arg("means"),
        py::arg("quats"), py::arg("scales"), py::arg("covars"), py::arg("opacities"),
        py::arg("viewmats"), py::arg("Ks"), py::arg("records"), py::arg("radii"),
        py::arg("gaussian_ids"), py::arg("image_offsets"), py::arg("n_invalid"));
  m.def("color", &color, py::kw_only(), py::arg("bits"), py::arg("threads"), py::arg("n_scenes"),
        py::arg("n_cameras"), py::arg("n_gaussians"), py::arg("width"), py::arg("height"),
        py::arg("sh_degree"), py::arg("n_bases"), py::arg("n_channels"), py::arg("per_camera"),
        py::arg("depth_channel"), py::arg("means"), py::arg("viewmats"), py::arg("Ks"),
        py::arg("colors"), py::arg("gaussian_ids"), py::arg("image_offsets"), py::arg("records"),
        py::arg("record_colors"), py::arg("n_invalid"));
  m.def("bin", &bin, py::kw_only(), py::arg("bits"), py::arg("threads"), py::arg("n_images"),
        py::arg("tiles_x"), py::arg("tiles_y"), py::arg("capacity"), py::arg("records"),
        py::arg("radii"), py::arg("image_offsets"), py::arg("tile_offsets"),
        py::arg("tile_records"));
  m.def("blend", &blend, py::kw_only(), py::arg("bits"), py::arg("threads"), py::arg("n_images"),
        py::arg("width"), py::arg("height"), py::arg("tiles_x"), py::arg("tiles_y"),
        py::arg("n_channels"), py::arg("alpha_cap"), py::arg("records"), py::arg("record_colors"),
        py::arg("image_offsets"), py::arg("tile_offsets"), py::arg("tile_records"),
        py::arg("colors"), py::arg("alphas"));
  m.def("composite", &composite, py::kw_only(), py::arg("bits"), py::arg("threads"),
        py::arg("n_images"), py::arg("width"), py::arg("height"), py::arg("out_width"),
        py::arg("out_height"), py::arg("n_channels"), py::arg("n_color_channels"),
        py::arg("expected_depth"), py::arg("clamp"), py::arg("channels_first"),
        py::arg("clamp_min"), py::arg("clamp_max"), py::arg("background_kind"),
        py::arg("pixel_type"), py::arg("colors"), py::arg("alphas"), py::arg("backgrounds"),
        py::arg("mean"), py::arg("std"), py::arg("out"), py::arg("out_alphas"));
}
