#include "module_cuda.h"

#if RAPFAST_WITH_CUDA
#include "cuda/check.cuh"
#include "cuda/scratch.h"
#include "feature_norm.h"
#include "render.h"
#include "stage_arguments.h"
#endif

namespace py = pybind11;

namespace rapfast {

#if RAPFAST_WITH_CUDA
namespace {

// Size in bytes of a call's state, and where its parts are. Asks no device.
py::dict state_layout_of(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const RenderSizes sizes = read_sizes(a);
  a.finish();
  const StateLayout l = state_layout(sizes);
  py::dict out;
  out["size"] = l.size;
  out["status"] = l.status;
  out["n_visible"] = l.n_visible;
  out["n_invalid"] = l.n_invalid;
  out["image_offsets"] = l.image_offsets;
  out["tile_offsets"] = l.tile_offsets;
  out["order"] = l.order;
  out["records"] = l.records;
  out["radii"] = l.radii;
  out["gaussian_ids"] = l.gaussian_ids;
  out["record_colors"] = l.record_colors;
  out["tile_records"] = l.tile_records;
  out["views"] = l.views;
  out["ballots"] = l.ballots;
  out["word_bases"] = l.word_bases;
  out["transmittances"] = l.transmittances;
  out["last_ids"] = l.last_ids;
  return out;
}

// A call but for its addresses. Python keeps one for each form of call: reading sixty numbers by name
// takes as long as launching all kernels.
struct RenderPlan {
  RenderParams params;
  int device;
  int64_t state_size, scratch_size;
  std::unique_ptr<FrontGraphs> graphs = std::make_unique<FrontGraphs>();

  explicit RenderPlan(const py::kwargs& kwargs) {
    Arguments a(kwargs);
    RenderParams& p = params;
    p = {};
    read_project_form(a, p.project);
    read_color_form(a, p.color);
    p.color.shared = a.get<bool>("shared_colors");
    p.with_net = a.get<bool>("with_net");
    RenderSizes& sizes = p.sizes;
    sizes.n_channels = a.get<int64_t>("n_channels");
    sizes.record_capacity = a.get<int64_t>("record_capacity");
    sizes.capacity = a.get<int64_t>("capacity");
    sizes.keep_state = a.get<bool>("keep_state");
    sizes.first_tile_row = a.get<int32_t>("first_tile_row");
    sizes.n_tile_rows = a.get<int32_t>("n_tile_rows");
    p.fixed_room = a.get<bool>("fixed_room");
    p.alpha_cap = float(a.get<double>("alpha_cap"));
    p.with_composite = a.get<bool>("with_composite");
    read_composite_options(a, p.composite);
    device = a.get<int>("device");
    a.finish();

    sizes.n_scenes = p.color.n_scenes = p.project.n_scenes;
    sizes.n_cameras = p.color.n_cameras = p.project.n_cameras;
    sizes.n_gaussians = p.color.n_gaussians = p.project.n_gaussians;
    sizes.width = p.color.width = p.composite.width = p.project.options.width;
    sizes.height = p.color.height = p.project.options.height;
    p.composite.height = sizes.rows();
    p.composite.n_images = sizes.n_scenes * sizes.n_cameras;
    p.composite.n_channels = sizes.n_channels;
    p.composite.n_color_channels =
        p.color.depth_channel == DepthChannel::kOnly ? 0 : p.color.n_channels;
    const DeviceGuard guard(device);
    state_size = state_layout(sizes).size;
    scratch_size = rapfast::scratch_size(sizes);
  }

  // The first part of a call. Addresses, 0 for what is absent; `net` None or the arguments of
  // read_net_form.
  std::unique_ptr<RenderCall> begin(uintptr_t means, uintptr_t quats, uintptr_t scales, uintptr_t covars,
                                    uintptr_t opacities, uintptr_t viewmats, uintptr_t Ks, uintptr_t colors,
                                    uintptr_t backgrounds, uintptr_t mean, uintptr_t std, uintptr_t state,
                                    uintptr_t scratch, uintptr_t worst, uintptr_t stage_events,
                                    const py::object& net, uintptr_t stream) const {
    RenderParams p = params;
    p.project.means = p.color.means = reinterpret_cast<const float*>(means);
    p.project.quats = reinterpret_cast<const float*>(quats);
    p.project.scales = reinterpret_cast<const float*>(scales);
    p.project.covars = reinterpret_cast<const float*>(covars);
    p.project.opacities = reinterpret_cast<const float*>(opacities);
    p.project.viewmats = p.color.viewmats = reinterpret_cast<const float*>(viewmats);
    p.project.Ks = p.color.Ks = reinterpret_cast<const float*>(Ks);
    p.color.colors = reinterpret_cast<const float*>(colors);
    p.composite.backgrounds = reinterpret_cast<const float*>(backgrounds);
    p.composite.mean = reinterpret_cast<const float*>(mean);
    p.composite.std = reinterpret_cast<const float*>(std);
    p.state = reinterpret_cast<char*>(state);
    p.scratch = reinterpret_cast<char*>(scratch);
    p.worst = reinterpret_cast<RenderStatus*>(worst);
    p.stage_events = reinterpret_cast<const cudaEvent_t*>(stage_events);
    p.graphs = graphs.get();
    if (p.with_net) {
      const py::kwargs arguments = py::reinterpret_borrow<py::kwargs>(net);
      Arguments a(arguments);
      read_net_form(a, p.net);
      a.finish();
    }
    py::gil_scoped_release release;
    return std::make_unique<RenderCall>(p, device, reinterpret_cast<cudaStream_t>(stream));
  }
};

// The second part; `images` and `out_alphas` are read where there is a composite. Returns the counts.
py::tuple finish_render(RenderCall& call, uintptr_t blended, uintptr_t alphas, uintptr_t images,
                        uintptr_t out_alphas) {
  HostCounts got;
  {
    py::gil_scoped_release release;
    got = call.finish({reinterpret_cast<float*>(blended), reinterpret_cast<float*>(alphas),
                       reinterpret_cast<void*>(images), reinterpret_cast<float*>(out_alphas)});
  }
  return py::make_tuple(got.counts.n_records, got.counts.n_intersections, got.n_visible);
}

// The stages one by one, for tests and for autograd. Their scratch is laid out as render's is.

int64_t project_scratch_size(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const int64_t n_images = a.get<int64_t>("n_images");
  const int64_t n_gaussians = a.get<int64_t>("n_gaussians");
  const int64_t capacity = a.get<int64_t>("capacity");
  const DeviceGuard guard(a.get<int>("device"));
  a.finish();
  Arena arena(nullptr);
  project_scratch(arena, n_images, n_gaussians, capacity);
  return arena.size();
}

void project(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ProjectParams<float> p = read_project<float>(a);
  Arena arena(a.pointer<void>("scratch"));
  Counts* counts = a.pointer<Counts>("counts");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  const ProjectScratch scratch =
      project_scratch(arena, p.n_scenes * p.n_cameras, p.n_gaussians, p.capacity);
  project_cuda(p, scratch, counts, {}, place.stream);
}

void color(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ColorParams<float> p = read_color<float>(a);
  DeviceView* views = a.pointer<DeviceView>("views");
  const int32_t* image_ids = a.pointer<const int32_t>("image_ids");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  // Of the options only the size matters here: colours read a view's centre.
  const ProjectOptions<float> options = {p.width, p.height, CameraModel::kPinhole, false, 0, 0, 0, 0};
  views_cuda(p.viewmats, p.Ks, p.n_scenes * p.n_cameras, options, views, place.stream);
  color_cuda(p, views, image_ids, place.stream);
}

void color_net(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const ColorNetParams<float> p = read_color_net<float>(a);
  DeviceView* views = a.pointer<DeviceView>("views");
  const int32_t* image_ids = a.pointer<const int32_t>("image_ids");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  const ColorParams<float>& c = p.color;
  const ProjectOptions<float> options = {c.width, c.height, CameraModel::kPinhole, false, 0, 0, 0, 0};
  views_cuda(c.viewmats, c.Ks, c.n_scenes * c.n_cameras, options, views, place.stream);
  color_net_cuda(p, views, image_ids, place.stream);
}

int64_t bin_scratch_size(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const int64_t n_images = a.get<int64_t>("n_images");
  const int64_t tiles_x = a.get<int64_t>("tiles_x"), tiles_y = a.get<int64_t>("tiles_y");
  const int64_t record_capacity = a.get<int64_t>("record_capacity");
  const int64_t capacity = a.get<int64_t>("capacity");
  a.finish();
  Arena arena(nullptr);
  bin_scratch(arena, n_images, region_grid(tiles_x, tiles_y), record_capacity, capacity);
  return arena.size();
}

void bin(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const BinParams<float> p = read_bin<float>(a);
  Arena arena(a.pointer<void>("scratch"));
  Counts* counts = a.pointer<Counts>("counts");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  const BinScratch scratch =
      bin_scratch(arena, p.n_images, region_grid(p.tiles_x, p.tiles_y), p.record_capacity, p.capacity);
  boxes_cuda(p, scratch, place.stream);
  bin_cuda(p, scratch, counts, nullptr, place.stream);
}

void blend(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const BlendParams<float> p = read_blend<float>(a);
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  blend_cuda(p, nullptr, nullptr, place.stream);
}

void composite(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const CompositeParams<float> p = read_composite<float>(a);
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  composite_cuda(p, place.stream);
}

// What the feature-map network does between its convolutions.

void map_stats(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  MapStatsParams p;
  p.n_images = a.get<int64_t>("n_images");
  p.n_pixels = a.get<int64_t>("n_pixels");
  p.channels = a.get<int32_t>("channels");
  p.eps = a.get<float>("eps");
  p.x = a.pointer<const void>("x");
  p.weight = a.pointer<const float>("weight");
  p.bias = a.pointer<const float>("bias");
  p.copy = a.pointer<void>("copy");
  p.copy_pitch = a.get<int64_t>("copy_pitch");
  p.scratch = a.pointer<void>("scratch");
  p.norm = a.pointer<float>("norm");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  map_stats_cuda(p, place.stream);
}

void map_norm(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  MapNormParams p;
  p.n_images = a.get<int64_t>("n_images");
  p.n_pixels = a.get<int64_t>("n_pixels");
  p.channels = a.get<int32_t>("channels");
  p.x = a.pointer<const void>("x");
  p.norm = a.pointer<const float>("norm");
  p.residual = a.pointer<const void>("residual");
  p.residual_norm = a.pointer<const float>("residual_norm");
  p.y = a.pointer<void>("y");
  p.copy = a.pointer<void>("copy");
  p.copy_pitch = a.get<int64_t>("copy_pitch");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  map_norm_cuda(p, place.stream);
}

void map_pool(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  MapPoolParams p;
  p.n_images = a.get<int64_t>("n_images");
  p.height = a.get<int32_t>("height");
  p.width = a.get<int32_t>("width");
  p.channels = a.get<int32_t>("channels");
  p.x = a.pointer<const void>("x");
  p.norm = a.pointer<const float>("norm");
  p.y = a.pointer<void>("y");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  map_pool_cuda(p, place.stream);
}

void map_unfold(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  MapUnfoldParams p;
  p.n_images = a.get<int64_t>("n_images");
  p.factor = a.get<int32_t>("factor");
  p.in_height = a.get<int32_t>("in_height");
  p.in_width = a.get<int32_t>("in_width");
  p.height = a.get<int32_t>("height");
  p.width = a.get<int32_t>("width");
  p.channels = a.get<int32_t>("channels");
  p.x = a.pointer<const void>("x");
  p.bias = a.pointer<const float>("bias");
  p.y = a.pointer<void>("y");
  p.pitch = a.get<int64_t>("pitch");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  map_unfold_cuda(p, place.stream);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("view_size") = sizeof(DeviceView);
  m.def("state_layout", &state_layout_of);
  m.def("color_stride", &color_stride);
  py::class_<RenderPlan>(m, "RenderPlan")
      .def(py::init<const py::kwargs&>())
      .def_readonly("state_size", &RenderPlan::state_size)
      .def_readonly("scratch_size", &RenderPlan::scratch_size)
      .def_property_readonly("n_graphs", [](const RenderPlan& plan) { return plan.graphs->count(); })
      .def("begin", &RenderPlan::begin);
  py::class_<RenderCall>(m, "RenderCall").def("finish", &finish_render);
  m.def("project_scratch_size", &project_scratch_size);
  m.def("project_cuda", &project);
  m.def("color_cuda", &color);
  m.def("color_net_cuda", &color_net);
  m.def("bin_scratch_size", &bin_scratch_size);
  m.def("bin_cuda", &bin);
  m.def("blend_cuda", &blend);
  m.def("composite_cuda", &composite);
  m.attr("map_stats_scratch") = kMapStatsScratch;
  m.def("map_stats_cuda", &map_stats);
  m.def("map_norm_cuda", &map_norm);
  m.def("map_pool_cuda", &map_pool);
  m.def("map_unfold_cuda", &map_unfold);
}

#else

void bind_cuda(py::module_&) {}

#endif

}  // namespace rapfast
