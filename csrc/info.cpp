// build_info(), cpu_missing(), cpu_supported(), cuda_devices(): what rapfast/info.py and
// rapfast/_native.py read.
//
// Compiled for the baseline instruction set, like module.cpp: all of it runs before the CPU check.
#include "info.h"

#include <sstream>
#include <string>

#include "build_config.h"
#include "cpu_features.h"
#if RAPFAST_WITH_CUDA
#include "cuda/device_query.h"
#endif

namespace py = pybind11;

namespace rapfast {
namespace {

py::list words(const char* text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["version"] = RAPFAST_VERSION;
  info["compiler"] = RAPFAST_COMPILER;
  info["build_type"] = RAPFAST_BUILD_TYPE;
  info["cpu_arch"] = RAPFAST_CPU_ARCH;
  info["cpu_flags"] = RAPFAST_CPU_FLAGS;
#if RAPFAST_WITH_CUDA
  info["cuda"] = RAPFAST_CUDA_VERSION;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_archs"] = words(RAPFAST_CUDA_ARCHS);
  info["cuda_stages"] = words(RAPFAST_CUDA_STAGES);
  return info;
}

py::list cpu_missing() {
  py::list list;
  for (const std::string& feature : cpu_missing_features()) list.append(feature);
  return list;
}

#if RAPFAST_WITH_CUDA
py::object version_or_none(int version) {
  if (version == 0) return py::none();
  return py::str(std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
}
#endif

py::dict cuda_devices() {
  py::dict answer;
  py::list devices;
#if RAPFAST_WITH_CUDA
  CudaQuery query;
  {
    py::gil_scoped_release
        release;  // the first call initialises the driver, which takes seconds on a large machine
    query = query_cuda_devices();
  }
  for (const CudaDevice& found : query.devices) {
    py::dict device;
    device["ordinal"] = found.ordinal;
    device["name"] = found.name;
    device["compute_capability"] = py::make_tuple(found.major, found.minor);
    device["memory"] = found.total_memory;
    device["multiprocessors"] = found.multiprocessors;
    devices.append(device);
  }
  answer["reason"] =
      query.reason.empty() ? py::object(py::none()) : py::object(py::str(query.reason));
  answer["driver"] = version_or_none(query.driver_version);
  answer["runtime"] = version_or_none(query.runtime_version);
#else
  answer["reason"] = RAPFAST_CUDA_WHY_NOT;
  answer["driver"] = py::none();
  answer["runtime"] = py::none();
#endif
  answer["devices"] = devices;
  return answer;
}

}  // namespace

void bind_info(py::module_& module) {
  module.def("build_info", &build_info,
             "What this module was built with: versions, architectures and flags.");
  module.def("cpu_missing", &cpu_missing,
             "Instruction sets that this build needs and this CPU lacks.");
  module.def(
      "cpu_supported", [] { return cpu_missing_features().empty(); },
      "Whether this CPU can run this build.");
  module.def("cuda_devices", &cuda_devices,
             "The CUDA devices, or the reason why there are none. Initialises the driver: not "
             "before a fork().");
}

}  // namespace rapfast
