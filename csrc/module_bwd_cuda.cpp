#include "module_cuda.h"

#if RAPFAST_WITH_CUDA
#include "backward_arguments.h"
#include "cuda/check.cuh"
#include "render_bwd.h"
#endif

namespace py = pybind11;

namespace rapfast {

#if RAPFAST_WITH_CUDA
namespace {

// A call's state that was kept for the backward pass: whole images, all rows of tiles.
class KeptState {
 public:
  explicit KeptState(Arguments& a) {
    sizes_ = read_sizes(a);
    layout_ = state_layout(sizes_);
    base_ = a.pointer<char>("state");
    n_records_ = a.get<int64_t>("n_records");
    places_ = a.pointer<const int32_t>("places");
  }

  const RenderSizes& sizes() const { return sizes_; }
  int64_t n_images() const { return sizes_.n_scenes * sizes_.n_cameras; }
  int64_t n_records() const { return n_records_; }
  const Record<float>* records() const { return part<Record<float>>(layout_.records); }
  const int32_t* radii() const { return part<int32_t>(layout_.radii); }
  const int32_t* gaussian_ids() const { return part<int32_t>(layout_.gaussian_ids); }
  const int64_t* image_offsets() const { return part<int64_t>(layout_.image_offsets); }
  Means2dLayout means2d() const { return {sizes_.n_gaussians, gaussian_ids(), places_}; }

  SeenBy seen() const {
    return {sizes_.n_scenes, sizes_.n_cameras, sizes_.n_gaussians, part<DeviceView>(layout_.views),
            part<uint32_t>(layout_.ballots), part<uint32_t>(layout_.word_bases)};
  }

  // The blend's backward but for its gradients.
  BlendBwdCudaParams blend() const {
    BlendBwdCudaParams p{};
    p.n_images = n_images();
    p.width = sizes_.width;
    p.height = sizes_.height;
    p.tiles_x = (sizes_.width + kTileSize - 1) / kTileSize;
    p.tiles_y = sizes_.n_tile_rows;
    p.n_channels = sizes_.n_channels;
    p.n_records = n_records_;
    p.records = records();
    p.record_colors = part<float>(layout_.record_colors);
    p.color_stride = color_stride(sizes_.n_channels);
    p.image_offsets = image_offsets();
    p.tile_offsets = part<int64_t>(layout_.tile_offsets);
    p.tile_records = part<int32_t>(layout_.tile_records);
    p.transmittances = part<float>(layout_.transmittances);
    p.last_ids = part<int32_t>(layout_.last_ids);
    p.layout = means2d();
    return p;
  }

 private:
  template <typename T>
  T* part(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  RenderSizes sizes_;
  StateLayout layout_;
  char* base_;
  int64_t n_records_;
  const int32_t* places_;
};

void means2d(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const KeptState state(a);
  Means2dParams p{};
  p.n_images = state.n_images();
  p.n_gaussians = state.sizes().n_gaussians;
  p.n_records = state.n_records();
  p.records = state.records();
  p.radii = state.radii();
  p.gaussian_ids = state.gaussian_ids();
  p.image_offsets = state.image_offsets();
  p.places = const_cast<int32_t*>(state.means2d().places);
  p.means2d = a.pointer<float>("means2d");
  p.scratch = a.pointer<uint32_t>("scratch");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  means2d_cuda(p, place.stream);
}

void blend_bwd(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  BlendBwdCudaParams p = KeptState(a).blend();
  p.n_intersections = a.get<int64_t>("n_intersections");
  p.alpha_cap = float(a.get<double>("alpha_cap"));
  p.v_colors = a.pointer<const float>("v_colors");
  p.v_alphas = a.pointer<const float>("v_alphas");
  p.order = a.pointer<uint32_t>("order");
  p.rows = a.pointer<float>("rows");
  p.v_means2d = a.pointer<float>("v_means2d");
  p.absgrad = a.pointer<float>("absgrad");
  p.exponents = a.pointer<int32_t>("exponents");
  p.fixed = a.pointer<int64_t>("fixed");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  blend_bwd_cuda(p, place.stream);
}

// From the gradients of records to those of everything that they were made of.
void gaussians_bwd(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const KeptState state(a);
  ProjectBwdParams<float> project{};
  project.camera_model = static_cast<CameraModel>(a.get<int32_t>("camera_model"));
  project.antialiased = a.get<bool>("antialiased");
  project.eps2d = float(a.get<double>("eps2d"));
  read_geometry(a, project);
  ColorBwdParams<float> color{};
  read_color_form(a, color);
  color.colors = a.pointer<const float>("colors");
  RecordGradients from{};
  from.rows = a.pointer<const float>("rows");
  from.v_means2d = a.pointer<const float>("v_means2d");
  from.v_records = a.pointer<const Record<float>>("v_records");
  project.v_means = a.pointer<float>("v_means");
  project.v_quats = a.pointer<float>("v_quats");
  project.v_scales = a.pointer<float>("v_scales");
  project.v_covars = a.pointer<float>("v_covars");
  project.v_opacities = a.pointer<float>("v_opacities");
  project.v_viewmats = a.pointer<float>("v_viewmats");
  project.v_Ks = a.pointer<float>("v_Ks");
  color.v_colors = a.pointer<float>("v_colors");
  ViewSums sums{};
  sums.project = a.pointer<float>("project_sums");
  sums.center = a.pointer<float>("center_sums");
  const Place place = read_place(a);
  a.finish();

  const RenderSizes& sizes = state.sizes();
  project.n_scenes = color.n_scenes = sizes.n_scenes;
  project.n_cameras = color.n_cameras = sizes.n_cameras;
  project.n_gaussians = color.n_gaussians = sizes.n_gaussians;
  project.width = sizes.width;
  project.height = sizes.height;
  color.means = project.means;
  color.viewmats = project.viewmats;
  from.stride = row_stride(sizes.n_channels);
  from.layout = state.means2d();
  const int64_t n_colors = color.depth_channel == DepthChannel::kOnly ? 0 : color.n_channels;
  from.depth_column = color.depth_channel == DepthChannel::kNone ? -1 : kRowColor + n_colors;
  // Harmonics move with the direction from the camera to the mean.
  const bool with_directions = color.sh_degree >= 0 && n_colors > 0 && from.rows != nullptr &&
                               (color.v_colors != nullptr || project.v_means != nullptr || sums.center != nullptr);
  color.v_means = with_directions ? project.v_means : nullptr;
  const bool with_geometry = project.v_means != nullptr || project.v_quats != nullptr ||
                             project.v_scales != nullptr || project.v_covars != nullptr ||
                             project.v_opacities != nullptr || sums.project != nullptr;

  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  if (from.rows != nullptr && (with_directions || (color.sh_degree < 0 && color.v_colors != nullptr))) {
    color_bwd_cuda(color, state.seen(), from.rows, from.stride, sums, place.stream);
  }
  if (with_geometry) {
    project_bwd_cuda(project, state.seen(), from, sums, color.v_means != nullptr, place.stream);
  }
  if (sums.project != nullptr || sums.center != nullptr) {
    view_gradients_cuda(state.seen(), sums, project.v_viewmats, project.v_Ks, place.stream);
  }
}

void composite_bwd(const py::kwargs& kwargs) {
  Arguments a(kwargs);
  const CompositeBwdParams<float> p = read_composite_bwd<float>(a);
  float* scratch = a.pointer<float>("scratch");
  const Place place = read_place(a);
  a.finish();
  py::gil_scoped_release release;
  const DeviceGuard guard(place.device);
  composite_bwd_cuda(p, scratch, place.stream);
}

}  // namespace

void bind_backward_cuda(py::module_& m) {
  m.attr("ordered_capacity") = kOrderedCapacity;
  m.def("row_stride", [](int64_t n_channels) { return row_stride(n_channels); });
  m.def("fixed_stride", [](int64_t n_channels) { return fixed_stride(n_channels); });
  m.def("means2d_chunks", &means2d_chunks);
  m.def("seen_chunks", &seen_chunks);
  m.def("background_blocks", &background_blocks);
  m.def("means2d_cuda", &means2d);
  m.def("blend_bwd_cuda", &blend_bwd);
  m.def("gaussians_bwd_cuda", &gaussians_bwd);
  m.def("composite_bwd_cuda", &composite_bwd);
}

#else

void bind_backward_cuda(py::module_&) {}

#endif

}  // namespace rapfast
