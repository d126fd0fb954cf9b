// The cheap frustum test against the full projection on many random pairs: it may drop nothing that
// project_gaussian would keep or count, whatever the camera, and must drop most of what is out of sight.
#include <cstdio>

#include "device_math_cases.h"

using namespace rapfast;

namespace {

constexpr int kItems = 300000;  // of each model and type

int failures = 0;

struct Item {
  float camera[25];
  float mean[3], quat[4], scale[3], opacity;
  int32_t width, height;
  float eps2d, near_plane;
};

// Cameras from a telescope to a fisheye that sees behind itself, some of them sheared, with principal points
// in and out of the image; Gaussians from dust to larger than the scene, many of them at the edges of the image.
Item draw(Random& r, bool ordinary) {
  Item item;
  item.width = 1 + r.below(ordinary ? 900 : 3000);
  item.height = 1 + r.below(ordinary ? 600 : 3000);
  random_camera(r, float(item.width), float(item.height), item.camera);
  for (float& x : item.mean) x = r.uniform(-4.f, 4.f);
  random_quaternion(r, item.quat);
  for (float& x : item.scale) x = r.power(-4.f, ordinary ? -1.f : 1.f);
  item.opacity = r.uniform();
  item.eps2d = 0.3f;
  item.near_plane = 0.01f;
  if (ordinary) return item;
  for (int axis = 0; axis < 2; ++axis) {
    item.camera[16 + 4 * axis] *= r.power(-1.5f, 1.f);                                        // focal lengths
    if (r.below(3) == 0) item.camera[18 + 3 * axis] += r.uniform(-3.f, 3.f) * float(item.width);  // centre
  }
  switch (r.below(12)) {
    case 0: item.mean[r.below(3)] = special(r); break;
    case 1: item.mean[r.below(3)] = r.sign() * r.power(-10.f, 38.f); break;
    case 2: item.scale[r.below(3)] = r.power(-30.f, 19.f); break;
    case 3: item.scale[0] = item.scale[1] = r.power(-6.f, -3.f); break;  // a needle
    case 4: item.opacity = r.uniform(0.f, 0.008f); break;
    case 5: item.eps2d = r.below(2) == 0 ? 0.f : r.power(-3.f, 2.f); break;
    case 6: item.near_plane = r.below(2) == 0 ? -3.f : r.power(-30.f, -2.f); break;
    case 7: item.camera[16 + r.below(9)] = special(r); break;
    case 8: item.camera[r.below(12)] = special(r); break;
    case 9: for (int i = 0; i < 12; ++i) item.camera[i] *= r.power(-0.02f, 0.02f); break;
    case 10: for (float& x : item.mean) x *= 1e-3f; break;  // about the camera, with near planes below
    default: break;
  }
  return item;
}

template <CameraModel kModel, typename T>
void test_model(const char* name, double least_dropped) {
  Random random(17 + uint64_t(kModel));
  int kept = 0, lost = 0, unseen = 0, dropped = 0;
  for (int i = 0; i < kItems; ++i) {
    const bool ordinary = i % 2 == 0;
    const Item item = draw(random, ordinary);
    T camera[25], quat[4], scale[3];
    for (int k = 0; k < 25; ++k) camera[k] = T(item.camera[k]);
    for (int k = 0; k < 4; ++k) quat[k] = T(item.quat[k]);
    for (int k = 0; k < 3; ++k) scale[k] = T(item.scale[k]);
    const Vec3<T> mean = {T(item.mean[0]), T(item.mean[1]), T(item.mean[2])};
    if (!is_finite(mean.x) || !is_finite(mean.y) || !is_finite(mean.z) || !valid_quaternion(quat)) continue;
    const View<T> view = load_view(camera, camera + 16, item.width, item.height);
    if (!view.valid) continue;
    const ProjectOptions<T> options = {item.width, item.height, kModel, false, T(item.eps2d), T(item.near_plane),
                                       T(1e10), T(0)};
    const Vec3<T> mean_c = world_to_camera(view, mean);
    Visibility seen = Visibility::kCulled;
    if (mean_c.z >= options.near_plane && mean_c.z <= options.far_plane) {
      Record<T> record;
      int32_t radii[2];
      seen = project_gaussian(view, options, mean_c, covariance(quat, scale), T(item.opacity), record, radii);
    }
    const bool maybe = may_be_seen<kModel>(
        make_frustum_test(view, options), mean.x, mean.y, mean.z,
        extent_of(mean.x, mean.y, mean.z, sigma_of_scales(scale), T(item.opacity)));
    if (seen != Visibility::kCulled) {
      ++kept;
      if (!maybe && ++lost <= 3) {
        std::printf("%s drops item %d:", name, i);
        for (float x : item.camera) std::printf(" %.9g", double(x));
        std::printf(" | %.9g %.9g %.9g | %.9g %.9g %.9g | %.9g, %d x %d, eps2d %g, near %g\n", double(item.mean[0]),
                    double(item.mean[1]), double(item.mean[2]), double(item.scale[0]), double(item.scale[1]),
                    double(item.scale[2]), double(item.opacity), item.width, item.height, double(item.eps2d),
                    double(item.near_plane));
      }
    } else if (ordinary) {
      ++unseen;
      dropped += !maybe;
    }
  }
  const double share = double(dropped) / double(unseen);
  std::printf("%-16s %d seen, %d of them dropped; of %d ordinary ones out of sight %.3f dropped\n", name, kept, lost,
              unseen, share);
  if (lost != 0 || kept < kItems / 20 || !(share >= least_dropped)) ++failures;
}

}  // namespace

int main() {
  test_model<CameraModel::kPinhole, float>("pinhole float", 0.97);
  test_model<CameraModel::kPinhole, double>("pinhole double", 0.97);
  test_model<CameraModel::kOrtho, float>("ortho float", 0.97);
  test_model<CameraModel::kOrtho, double>("ortho double", 0.97);
  test_model<CameraModel::kFisheye, float>("fisheye float", 0.9);
  test_model<CameraModel::kFisheye, double>("fisheye double", 0.9);
  if (failures != 0) std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
