// Which instruction sets this build needs and this processor has.
#pragma once

#include <string>
#include <vector>

namespace rapfast {

// Names of the instruction sets that csrc/cpu was compiled for and that this processor, or its
// operating system, does not offer; empty when the build can run here.
std::vector<std::string> cpu_missing_features();

}  // namespace rapfast
