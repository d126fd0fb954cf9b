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

// The backward of calls of one kind, but for its addresses and counts: what a training loop's next step will ask for
// again. Addresses are 0 for what is absent. The state is of whole images, all rows of tiles.
class BackwardPlan {
 public:
  explicit BackwardPlan(const py::kwargs& kwargs) {
    Arguments a(kwargs);
    sizes_ = read_sizes(a);
    layout_ = state_layout(sizes_);
    project_.camera_model = static_cast<CameraModel>(a.get<int32_t>("camera_model"));
    project_.antialiased = a.get<bool>("antialiased");
    project_.eps2d = float(a.get<double>("eps2d"));
    read_color_form(a, color_);
    alpha_cap_ = float(a.get<double>("alpha_cap"));
    device_ = a.get<int>("device");
    a.finish();
    project_.n_scenes = color_.n_scenes = sizes_.n_scenes;
    project_.n_cameras = color_.n_cameras = sizes_.n_cameras;
    project_.n_gaussians = color_.n_gaussians = sizes_.n_gaussians;
    project_.width = sizes_.width;
    project_.height = sizes_.height;
  }

  // Numbers of scratch that gaussians() takes where gradients of views are wanted.
  int64_t sums_size() const { return n_images() * seen_chunks(sizes_.n_gaussians) * (kProjectSums + kCenterSums); }

  // The means of visible records: dense [I, N, 2], or packed with `places` [M]. Writes every number.
  void means2d(uintptr_t state, int64_t n_records, uintptr_t places, uintptr_t means2d, uintptr_t scratch,
               uintptr_t stream) const {
    const KeptState kept(*this, state, places);
    Means2dParams p{};
    p.n_images = n_images();
    p.n_gaussians = sizes_.n_gaussians;
    p.n_records = n_records;
    p.records = kept.records();
    p.radii = kept.radii();
    p.gaussian_ids = kept.gaussian_ids();
    p.image_offsets = kept.image_offsets();
    p.places = reinterpret_cast<int32_t*>(places);
    p.means2d = reinterpret_cast<float*>(means2d);
    p.scratch = reinterpret_cast<uint32_t*>(scratch);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    py::gil_scoped_release release;
    const DeviceGuard guard(device_);
    if (p.places == nullptr) clear(p.means2d, dense_means2d(), on);
    means2d_cuda(p, on);
  }

  // From the gradients of blended images to those of records: `rows` and `v_means2d`, of so many points, are written
  // whole. `exponents` and `fixed` as BlendBwdCudaParams has them, the latter two cleared here.
  void pixels(uintptr_t state, int64_t n_records, int64_t n_intersections, int64_t n_points, uintptr_t places,
              uintptr_t v_colors, uintptr_t v_alphas, uintptr_t absgrad, uintptr_t exponents, uintptr_t fixed,
              uintptr_t rows, uintptr_t v_means2d, uintptr_t stream) const {
    const KeptState kept(*this, state, places);
    BlendBwdCudaParams p{};
    p.n_images = n_images();
    p.width = sizes_.width;
    p.height = sizes_.height;
    p.tiles_x = int32_t(tiles_x());
    p.tiles_y = sizes_.n_tile_rows;
    p.n_channels = sizes_.n_channels;
    p.n_records = n_records;
    p.n_intersections = n_intersections;
    p.alpha_cap = alpha_cap_;
    p.records = kept.records();
    p.record_colors = kept.part<float>(layout_.record_colors);
    p.color_stride = color_stride(sizes_.n_channels);
    p.image_offsets = kept.image_offsets();
    p.tile_offsets = kept.part<int64_t>(layout_.tile_offsets);
    p.tile_records = kept.part<int32_t>(layout_.tile_records);
    p.transmittances = kept.part<float>(layout_.transmittances);
    p.last_ids = kept.part<int32_t>(layout_.last_ids);
    p.layout = kept.means2d();
    p.v_colors = reinterpret_cast<const float*>(v_colors);
    p.v_alphas = reinterpret_cast<const float*>(v_alphas);
    p.absgrad = reinterpret_cast<float*>(absgrad);
    p.order = kept.part<uint32_t>(layout_.order);
    p.exponents = reinterpret_cast<int32_t*>(exponents);
    p.fixed = reinterpret_cast<int64_t*>(fixed);
    p.rows = reinterpret_cast<float*>(rows);
    p.v_means2d = reinterpret_cast<float*>(v_means2d);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    py::gil_scoped_release release;
    const DeviceGuard guard(device_);
    clear(p.rows, n_records * row_stride(sizes_.n_channels), on);
    clear(p.v_means2d, 2 * n_points, on);
    if (p.fixed != nullptr) {
      clear(p.exponents, n_records * fixed_stride(sizes_.n_channels), on);
      clear(p.fixed, n_records * fixed_stride(sizes_.n_channels), on);
    }
    blend_bwd_cuda(p, on);
  }

  // From the gradients of records to those of everything that they were made of. Every number of an output that is not
  // absent is written, where there are records, and of v_colors where `rows` are there and colours are drawn.
  void gaussians(uintptr_t state, uintptr_t places, uintptr_t means, uintptr_t quats, uintptr_t scales,
                 uintptr_t covars, uintptr_t opacities, uintptr_t viewmats, uintptr_t Ks, uintptr_t colors,
                 uintptr_t rows, uintptr_t v_means2d, uintptr_t v_records, uintptr_t sums_scratch, uintptr_t v_means,
                 uintptr_t v_quats, uintptr_t v_scales, uintptr_t v_covars, uintptr_t v_opacities,
                 uintptr_t v_viewmats, uintptr_t v_Ks, uintptr_t v_colors, uintptr_t stream) const {
    const auto in = [](uintptr_t at) { return reinterpret_cast<const float*>(at); };
    const auto out = [](uintptr_t at) { return reinterpret_cast<float*>(at); };
    const KeptState kept(*this, state, places);
    ProjectBwdParams<float> project = project_;
    project.means = in(means);
    project.quats = in(quats);
    project.scales = in(scales);
    project.covars = in(covars);
    project.opacities = in(opacities);
    project.viewmats = in(viewmats);
    project.Ks = in(Ks);
    project.v_means = out(v_means);
    project.v_quats = out(v_quats);
    project.v_scales = out(v_scales);
    project.v_covars = out(v_covars);
    project.v_opacities = out(v_opacities);
    project.v_viewmats = out(v_viewmats);
    project.v_Ks = out(v_Ks);
    ColorBwdParams<float> color = color_;
    color.means = project.means;
    color.viewmats = project.viewmats;
    color.colors = in(colors);
    color.v_colors = out(v_colors);
    RecordGradients from{};
    from.rows = in(rows);
    from.v_means2d = in(v_means2d);
    from.v_records = reinterpret_cast<const Record<float>*>(v_records);
    from.stride = row_stride(sizes_.n_channels);
    from.layout = kept.means2d();
    const int64_t n_colors = color.depth_channel == DepthChannel::kOnly ? 0 : color.n_channels;
    from.depth_column = color.depth_channel == DepthChannel::kNone ? -1 : kRowColor + n_colors;
    const bool with_harmonics = color.sh_degree >= 0 && n_colors > 0 && from.rows != nullptr;
    ViewSums sums{};
    if (project.v_viewmats != nullptr || project.v_Ks != nullptr) {
      sums.project = out(sums_scratch);
      // Harmonics move with the direction from the camera to the mean.
      if (with_harmonics && project.v_viewmats != nullptr) {
        sums.center = sums.project + n_images() * seen_chunks(sizes_.n_gaussians) * kProjectSums;
      }
    }
    const bool with_directions =
        with_harmonics && (color.v_colors != nullptr || project.v_means != nullptr || sums.center != nullptr);
    color.v_means = with_directions ? project.v_means : nullptr;
    const bool with_geometry = project.v_means != nullptr || project.v_quats != nullptr ||
                               project.v_scales != nullptr || project.v_covars != nullptr ||
                               project.v_opacities != nullptr || sums.project != nullptr;
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    py::gil_scoped_release release;
    const DeviceGuard guard(device_);
    if (with_directions || (from.rows != nullptr && color.sh_degree < 0 && color.v_colors != nullptr)) {
      color_bwd_cuda(color, kept.seen(), from.rows, from.stride, sums, on);
    }
    if (with_geometry) project_bwd_cuda(project, kept.seen(), from, sums, color.v_means != nullptr, on);
    if (sums.project != nullptr) {
      view_gradients_cuda(kept.seen(), sums, project.v_viewmats, project.v_Ks, on);
    }
  }

 private:
  static constexpr int64_t kProjectSums = 16, kCenterSums = 3;  // of ViewSums

  // Parts of one call's state.
  class KeptState {
   public:
    KeptState(const BackwardPlan& plan, uintptr_t base, uintptr_t places)
        : plan_(plan), base_(reinterpret_cast<char*>(base)), places_(reinterpret_cast<const int32_t*>(places)) {}

    template <typename T>
    T* part(int64_t offset) const {
      return reinterpret_cast<T*>(base_ + offset);
    }
    const Record<float>* records() const { return part<Record<float>>(plan_.layout_.records); }
    const int32_t* radii() const { return part<int32_t>(plan_.layout_.radii); }
    const int32_t* gaussian_ids() const { return part<int32_t>(plan_.layout_.gaussian_ids); }
    const int64_t* image_offsets() const { return part<int64_t>(plan_.layout_.image_offsets); }
    Means2dLayout means2d() const { return {plan_.sizes_.n_gaussians, gaussian_ids(), places_, radii()}; }
    SeenBy seen() const {
      const RenderSizes& s = plan_.sizes_;
      return {s.n_scenes, s.n_cameras, s.n_gaussians, part<DeviceView>(plan_.layout_.views),
              part<uint32_t>(plan_.layout_.ballots), part<uint32_t>(plan_.layout_.word_bases)};
    }

   private:
    const BackwardPlan& plan_;
    char* base_;
    const int32_t* places_;
  };

  template <typename T>
  static void clear(T* at, int64_t count, cudaStream_t stream) {
    if (count > 0) check(cudaMemsetAsync(at, 0, size_t(count) * sizeof(T), stream), "cudaMemsetAsync");
  }

  int64_t n_images() const { return sizes_.n_scenes * sizes_.n_cameras; }
  int64_t tiles_x() const { return (sizes_.width + kTileSize - 1) / kTileSize; }
  int64_t dense_means2d() const { return 2 * n_images() * sizes_.n_gaussians; }

  RenderSizes sizes_{};
  StateLayout layout_{};
  ProjectBwdParams<float> project_{};
  ColorBwdParams<float> color_{};
  float alpha_cap_ = 0.f;
  int device_ = 0;
};

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
  m.def("row_stride", [](int64_t n_channels) { return row_stride(n_channels); });
  m.def("fixed_stride", [](int64_t n_channels) { return fixed_stride(n_channels); });
  m.def("means2d_chunks", &means2d_chunks);
  m.def("background_blocks", &background_blocks);
  py::class_<BackwardPlan>(m, "BackwardPlan")
      .def(py::init<const py::kwargs&>())
      .def_property_readonly("sums_size", &BackwardPlan::sums_size)
      .def("means2d", &BackwardPlan::means2d)
      .def("pixels", &BackwardPlan::pixels)
      .def("gaussians", &BackwardPlan::gaussians);
  m.def("composite_bwd_cuda", &composite_bwd);
}

#else

void bind_backward_cuda(py::module_&) {}

#endif

}  // namespace rapfast
