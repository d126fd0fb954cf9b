// Stage 2 by a colour network instead: the colour of every record from a ReLU network that is fed a
// view's appearance. docs/appearance.md says which network; rapfast/appearance/fused.py makes the
// layers out of its weights.
#pragma once

#include "color.h"
#include "math/appearance.h"

namespace rapfast {

constexpr int kMaxNetLayers = 16;
constexpr int kMaxNetWidth = 256;
constexpr int kNetBlock = 16;  // widths are padded to multiples of it

// y = W x + b, and ReLU but for the last layer.
struct NetLayer {
  int32_t n_in;   // inputs, padded
  int32_t n_out;  // outputs, padded; W and b are 0 there
  // kNetBlock further inputs behind the others: the view direction and zeros.
  int32_t takes_direction;
  int64_t weights;  // where they begin in ColorNetParams::weights
  int64_t base;     // first column in a Gaussian's base row, which then is b; else -1 and
  int64_t biases;   // where b begins in ColorNetParams::biases
};

enum class NetInput : int32_t {
  kMaps = 0,       // sampled from the view's feature map, 48
  kEmbedding = 1,  // one vector for the whole view
  kFeatures = 2,   // one vector for each Gaussian, or for each Gaussian of each view
};

enum class NetOutput : int32_t {
  kColor = 0,  // 3 numbers, as they are
  kSh = 1,     // [K, 3] spherical harmonics: max(SH(direction) + 0.5, 0)
  kRaw = 2,    // n_outputs numbers as they are, whatever they be
};

// One view's own inputs.
struct NetView {
  const void* map;        // [height, width, 48]
  int32_t height, width;  // of the map
  double weight;          // scales the input
};

template <typename T>
struct ColorNetParams {
  // One scene. n_channels is 3, or n_outputs with kRaw; `colors`, `sh_degree`, `n_bases` and
  // `per_camera` are not read. With kRaw `records` and `n_invalid` may be null, depth_channel is kNone
  // and color_stride n_outputs.
  ColorParams<T> color;
  NetInput input;
  NetOutput output;
  bool half;           // fp16 weights, base and maps, tensor cores (GPU only); else all of type T
  int32_t n_inputs;    // columns of `features`; 48 with maps
  int32_t n_outputs;   // of the last layer that are used: 3, 3 K, or any number
  int32_t sh_degree;   // with kSh
  int32_t n_layers;    // 1 .. kMaxNetLayers
  NetLayer layers[kMaxNetLayers];
  // Of each layer [n_in (+ 16), n_out] in type T. With `half`, in the order of the tensor cores'
  // operands: [n_out / 16, n_in (+ 16) / 16, 32 lanes, 8], see color_net_half.cu, layer behind layer without
  // gaps.
  const void* weights;
  const T* biases;
  const void* base;     // [N, base_stride] of type T or half
  int64_t base_stride;  // a multiple of kNetBlock
  const NetView* views; // [I]
  const T* box_coord;   // [N, 3, 2] with maps
  T coord_scale;        // the first two rows are divided by it
  const T* features;    // [C, n_inputs] or [(C,) N, n_inputs]
  bool per_camera_features;  // with kFeatures: there is a C
};

// `half` must be false.
template <typename T>
void color_net_cpu(const ColorNetParams<T>& params, int threads);

#if RAPFAST_WITH_CUDA
void color_net_cuda(const ColorNetParams<float>& params, const DeviceView* views,
                    const int32_t* image_ids, cudaStream_t stream);
#endif

}  // namespace rapfast
