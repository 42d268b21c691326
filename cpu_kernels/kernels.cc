// Batch norm and depthwise convolution with their ReLUs, separate and fused, for training on
// CPUs. `build.py` compiles this file.
//
// These operations are limited by memory bandwidth, so each reads its images as few times as
// possible, in their own format (float32 or bfloat16), and computes in float32.
//
// Partial sums have sizes that do not depend on the number of threads and are added in a fixed
// order: the same input gives the same bits with any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "absl/base/casts.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

// Asserts that the iterations of the next loop are independent, so that it can be vectorized.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// A bfloat16 is the upper half of a float32. Compilers vectorize it as an integer.
using Bfloat16Bits = uint16_t;

inline float ToFloat(float value) { return value; }

inline float ToFloat(Bfloat16Bits bits) {
  return absl::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline void Store(float value, float* target) { *target = value; }

inline void Store(float value, Bfloat16Bits* target) {
  const uint32_t bits = absl::bit_cast<uint32_t>(value);
  const uint32_t to_nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *target = value == value ? to_nearest_even : 0x7fc0;  // rounding could turn a NaN into a number
}

template <typename T>
struct Format {
  using Type = T;
};

template <>
struct Format<tensorflow::bfloat16> {
  using Type = Bfloat16Bits;
};

template <typename T>
const typename Format<T>::Type* Values(const Tensor& tensor) {
  return reinterpret_cast<const typename Format<T>::Type*>(tensor.flat<T>().data());
}

template <typename T>
typename Format<T>::Type* Values(Tensor* tensor) {
  return reinterpret_cast<typename Format<T>::Type*>(tensor->flat<T>().data());
}

// Calls work(begin, end) for parts of [0, count) on the device's threads.
void InParallel(OpKernelContext* context, int64_t count, int64_t cycles_each,
                const std::function<void(int64_t, int64_t)>& work) {
  const auto* threads = context->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(threads->num_threads, threads->workers, count, cycles_each, work);
}

// Adds rows of `size` numbers in order.
std::vector<double> AddRows(const std::vector<float>& rows, int64_t size) {
  std::vector<double> sums(size);
  for (size_t row = 0; row < rows.size(); row += size) {
    for (int64_t i = 0; i < size; ++i) sums[i] += rows[row + i];
  }
  return sums;
}

// Sums pair(index of a value, its channel), which returns two numbers, over all pixels. Returns
// the sums of the first numbers of all channels, then those of the second numbers. Sums over 128
// pixels are float, the sum of those is double.
template <typename Pair>
std::vector<double> SumPairs(OpKernelContext* context, int64_t pixels, int64_t channels,
                             const Pair pair) {
  constexpr int64_t kPixels = 128;  // per part: enough parts for all threads
  constexpr int64_t kAtOnce = 4;    // pixels per update of a partial sum
  const int64_t parts = (pixels + kPixels - 1) / kPixels;
  std::vector<float> sums(parts * 2 * channels);
  InParallel(context, parts, kPixels * channels, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* first = &sums[part * 2 * channels];
      float* second = first + channels;
      const int64_t last_pixel = std::min(pixels, (part + 1) * kPixels);
      int64_t pixel = part * kPixels;
      for (; pixel + kAtOnce <= last_pixel; pixel += kAtOnce) {
        INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t i = pixel * channels + c;
          const auto p = pair(i, c), q = pair(i + channels, c);
          const auto r = pair(i + 2 * channels, c), s = pair(i + 3 * channels, c);
          first[c] += (p.first + q.first) + (r.first + s.first);
          second[c] += (p.second + q.second) + (r.second + s.second);
        }
      }
      for (; pixel < last_pixel; ++pixel) {
        INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          const auto p = pair(pixel * channels + c, c);
          first[c] += p.first;
          second[c] += p.second;
        }
      }
    }
  });
  return AddRows(sums, 2 * channels);
}

// Calls function(index of a value, its channel) for all values of all pixels.
template <typename Function>
void ForEachValue(OpKernelContext* context, int64_t pixels, int64_t channels,
                  const Function function) {
  InParallel(context, pixels, channels, [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      INDEPENDENT
      for (int64_t c = 0; c < channels; ++c) function(pixel * channels + c, c);
    }
  });
}

// Returns an error unless the shapes of images and parameters match; the kernels rely on it.
absl::Status CheckSizes(const Tensor& images, std::initializer_list<const Tensor*> parameters) {
  if (images.dims() != 4 || images.NumElements() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("images must have four dimensions and at least one pixel, got ",
                     images.shape().DebugString()));
  }
  for (const Tensor* parameter : parameters) {
    if (parameter->shape() != TensorShape({images.dim_size(3)})) {
      return absl::InvalidArgumentError(
          absl::StrCat("a parameter must have one value for each of the ", images.dim_size(3),
                       " channels, got ", parameter->shape().DebugString()));
    }
  }
  return absl::OkStatus();
}

// The statistics of a batch norm, which maps each value x to (x - center) * factor + term.
struct Statistics {
  const float *center, *inverse_deviation, *term;
  std::vector<float> factors;
};

Statistics StatisticsOf(const Tensor& mean, const Tensor& inverse_deviation, const Tensor& scale,
                        const Tensor& offset) {
  const float* inverse = inverse_deviation.flat<float>().data();
  std::vector<float> factors(scale.NumElements());
  for (size_t c = 0; c < factors.size(); ++c) {
    factors[c] = scale.flat<float>().data()[c] * inverse[c];
  }
  return {mean.flat<float>().data(), inverse, offset.flat<float>().data(), std::move(factors)};
}

// Reads inputs 0 to 2 (images, scale, offset), computes the statistics, and writes outputs 1 to 3
// (mean, variance, inverse_deviation).
template <typename T>
absl::StatusOr<Statistics> ComputeStatistics(OpKernelContext* context, float epsilon) {
  const Tensor &images = context->input(0), &scale = context->input(1);
  const Tensor& offset = context->input(2);
  if (const auto status = CheckSizes(images, {&scale, &offset}); !status.ok()) return status;
  Tensor *mean, *variance, *inverse_deviation;
  int i = 1;
  for (Tensor** output : {&mean, &variance, &inverse_deviation}) {
    if (const auto status = context->allocate_output(i++, scale.shape(), output); !status.ok()) {
      return status;
    }
  }

  // One pass. Squares are taken relative to one of the channel's values: if the mean is large,
  // squares of the values themselves would cancel.
  const int64_t channels = images.dim_size(3), pixels = images.NumElements() / channels;
  const auto* x = Values<T>(images);
  std::vector<float> origins(channels);
  for (int64_t c = 0; c < channels; ++c) origins[c] = ToFloat(x[c]);
  const float* origin = origins.data();
  const auto sums = SumPairs(context, pixels, channels, [=](int64_t i, int64_t c) {
    const float distance = ToFloat(x[i]) - origin[c];
    return std::make_pair(distance, distance * distance);
  });
  for (int64_t c = 0; c < channels; ++c) {
    const double distance = sums[c] / pixels;
    const double square = sums[channels + c] / pixels - distance * distance;
    // std::max(0, square) would hide a NaN.
    const double biased_variance = square < 0 ? 0 : square;
    mean->flat<float>().data()[c] = origins[c] + distance;
    inverse_deviation->flat<float>().data()[c] = 1 / std::sqrt(biased_variance + epsilon);
    // TensorFlow averages the unbiased estimate.
    variance->flat<float>().data()[c] =
        biased_variance * pixels / std::max<int64_t>(pixels - 1, 1);
  }
  return StatisticsOf(*mean, *inverse_deviation, scale, offset);
}

// Writes the gradients of a batch norm.
//
// passed(index of a value, its channel): gradient of the batch norm's output, before the ReLU.
// sums: the sums of `passed` per channel, then those of its products with x - center.
template <typename Value, typename Passed>
void WriteGradients(OpKernelContext* context, const Statistics& statistics, const double* sums,
                    const Passed passed, int64_t pixels, const Value* x, Value* dx,
                    Tensor* scale_gradient, Tensor* offset_gradient) {
  const int64_t channels = statistics.factors.size();
  const float *center = statistics.center, *factor = statistics.factors.data();
  std::vector<float> slopes(channels), shifts(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const float inverse = statistics.inverse_deviation[c];
    const double scaled_sum = sums[channels + c] * inverse;
    offset_gradient->flat<float>().data()[c] = sums[c];
    scale_gradient->flat<float>().data()[c] = scaled_sum;
    slopes[c] = -factor[c] * scaled_sum * inverse / pixels;
    shifts[c] = -factor[c] * sums[c] / pixels;
  }
  const float *slope = slopes.data(), *shift = shifts.data();
  ForEachValue(context, pixels, channels, [=](int64_t i, int64_t c) {
    Store(factor[c] * passed(i, c) + slope[c] * (ToFloat(x[i]) - center[c]) + shift[c], dx + i);
  });
}

// y = (x - mean) / deviation * scale + offset with the batch's statistics, followed by max(y, 0)
// if the attribute relu is true.
template <typename T>
class BatchNorm : public OpKernel {
 public:
  explicit BatchNorm(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const auto statistics = ComputeStatistics<T>(context, epsilon_);
    OP_REQUIRES_OK(context, statistics.status());
    const Tensor& images = context->input(0);
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, images.shape(), &output));
    const int64_t channels = images.dim_size(3), pixels = images.NumElements() / channels;
    const auto* x = Values<T>(images);
    auto* y = Values<T>(output);
    const float *center = statistics->center, *factor = statistics->factors.data();
    const float* term = statistics->term;
    const float lowest = relu_ ? 0 : -std::numeric_limits<float>::infinity();
    ForEachValue(context, pixels, channels, [=](int64_t i, int64_t c) {
      const float value = (ToFloat(x[i]) - center[c]) * factor[c] + term[c];
      Store(value < lowest ? lowest : value, y + i);
    });
  }

 private:
  float epsilon_;
  bool relu_;
};

// The gradients of BatchNorm with respect to x, scale and offset.
template <typename T>
class BatchNormGrad : public OpKernel {
 public:
  explicit BatchNormGrad(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    relu_ ? ComputeGradients<true>(context) : ComputeGradients<false>(context);
  }

 private:
  template <bool relu>
  void ComputeGradients(OpKernelContext* context) {
    const Tensor &gradient = context->input(0), &images = context->input(1);
    const Tensor &scale = context->input(2), &offset = context->input(3);
    const Tensor &mean = context->input(4), &inverse_deviation = context->input(5);
    OP_REQUIRES_OK(context,
                   CheckSizes(images, {&scale, &offset, &mean, &inverse_deviation}));
    OP_REQUIRES(context, gradient.shape() == images.shape(),
                absl::InvalidArgumentError("gradient and images differ in shape"));
    Tensor *images_gradient, *scale_gradient, *offset_gradient;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output(
                                {0}, 0, images.shape(), &images_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(1, scale.shape(), &scale_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(2, scale.shape(), &offset_gradient));

    const int64_t channels = images.dim_size(3), pixels = images.NumElements() / channels;
    const auto *dy = Values<T>(gradient), *x = Values<T>(images);
    const auto statistics = StatisticsOf(mean, inverse_deviation, scale, offset);
    const float *center = statistics.center, *factor = statistics.factors.data();
    const float* term = statistics.term;
    // Recomputes y to find where it was positive.
    const auto passed = [=](int64_t i, int64_t c) {
      const float value = ToFloat(dy[i]);
      return !relu || (ToFloat(x[i]) - center[c]) * factor[c] + term[c] > 0 ? value : 0.0f;
    };
    const auto sums = SumPairs(context, pixels, channels, [=](int64_t i, int64_t c) {
      const float value = passed(i, c);
      return std::make_pair(value, value * (ToFloat(x[i]) - center[c]));
    });
    WriteGradients(context, statistics, sums.data(), passed, pixels, x,
                   Values<T>(images_gradient), scale_gradient, offset_gradient);
  }

  bool relu_;
};

// Sixteen channels at a time; the compiler maps them to the processor's vectors.
constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t LaneBits __attribute__((vector_size(64)));
typedef Bfloat16Bits Bfloat16Lanes __attribute__((vector_size(32)));

inline Lanes LoadLanes(const float* values) {
  Lanes lanes;
  std::memcpy(&lanes, values, sizeof lanes);  // one instruction, aligned or not
  return lanes;
}

inline Lanes LoadLanes(const Bfloat16Bits* values) {
  Bfloat16Lanes bits;
  std::memcpy(&bits, values, sizeof bits);
#ifdef __AVX512F__  // GCC's __builtin_convertvector takes three times as many instructions
  const auto wide = reinterpret_cast<LaneBits>(
      _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#else
  const auto wide = __builtin_convertvector(bits, LaneBits);
#endif
  return reinterpret_cast<Lanes>(wide << 16);
}

inline void StoreLanes(Lanes lanes, float* target) { std::memcpy(target, &lanes, sizeof lanes); }

inline void StoreLanes(Lanes lanes, Bfloat16Bits* target) {
#ifdef __AVX512BF16__
  const auto stored = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(lanes));
#else
  const LaneBits bits = reinterpret_cast<LaneBits>(lanes);
  const LaneBits to_nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const LaneBits not_a_number = LaneBits{} + 0x7fc0;
  const Bfloat16Lanes stored = __builtin_convertvector(
      lanes == lanes ? to_nearest_even : not_a_number, Bfloat16Lanes);
#endif
  std::memcpy(target, &stored, sizeof stored);
}

// How a depthwise convolution reads its images: here, the pixels as they are.
struct Pixels {
  // Returns the reading of the lanes that start at channel c.
  Pixels From(int64_t c) const { return {}; }
  Lanes Read(Lanes pixels) const { return pixels; }
  // Returns the gradient with respect to the pixels.
  Lanes PassBack(Lanes pixels, Lanes gradient) { return gradient; }
  // Adds the sums that PassBack collected to kNumSums rows of all channels.
  void AddSums(float* sums, int64_t channels, int64_t num_done) const {}
  static constexpr int kNumSums = 0;
};

// max(pixel, 0), which keeps NaN.
struct RectifiedPixels : Pixels {
  RectifiedPixels From(int64_t c) const { return {}; }
  Lanes Read(Lanes pixels) const { return pixels < 0 ? Lanes{} : pixels; }
  Lanes PassBack(Lanes pixels, Lanes gradient) { return pixels > 0 ? gradient : Lanes{}; }
};

// Adds all lanes except the first num_done, which have already been added.
inline void AddLanes(Lanes lanes, int64_t num_done, float* target) {
  const Lanes sum = LoadLanes(target) + lanes;
  std::memcpy(target + num_done, reinterpret_cast<const float*>(&sum) + num_done,
              (kLanes - num_done) * sizeof(float));
}

// The output of a batch norm and its ReLU.
class NormalizedPixels {
 public:
  explicit NormalizedPixels(const Statistics& statistics) : statistics_(statistics) {}

  struct Channels {
    Lanes center, factor, term;
    Lanes sum = {}, sum_of_products = {};

    Lanes Read(Lanes pixels) const {
      const Lanes value = (pixels - center) * factor + term;
      return value < 0 ? Lanes{} : value;
    }
    // The gradient of the batch norm's output. That of its input needs the complete sums.
    Lanes PassBack(Lanes pixels, Lanes gradient) {
      const Lanes distance = pixels - center;
      const Lanes passed = distance * factor + term > 0 ? gradient : Lanes{};
      sum += passed;
      sum_of_products += passed * distance;
      return passed;
    }
    void AddSums(float* sums, int64_t channels, int64_t num_done) const {
      AddLanes(sum, num_done, sums);
      AddLanes(sum_of_products, num_done, sums + channels);
    }
  };

  Channels From(int64_t c) const {
    return {LoadLanes(statistics_.center + c), LoadLanes(statistics_.factors.data() + c),
            LoadLanes(statistics_.term + c)};
  }
  static constexpr int kNumSums = 2;

 private:
  const Statistics& statistics_;
};

// A row of an image with the rows above and below it, for a 3 x 3 depthwise convolution with
// stride 1 and padding SAME.
template <typename Value>
class Rows {
 public:
  // `row` counts the rows of all images.
  Rows(const Tensor& images, const Value* values, int64_t row)
      : width_(images.dim_size(2)), channels_(images.dim_size(3)) {
    const int64_t height = images.dim_size(1), row_size = width_ * channels_;
    rows_[1] = values + row * row_size;
    rows_[0] = row % height > 0 ? rows_[1] - row_size : nullptr;
    rows_[2] = (row + 1) % height > 0 ? rows_[1] + row_size : nullptr;
    row_after_next_ = rows_[1] + 2 * row_size;  // may not exist: it is only prefetched
  }

  // Calls visit(index in the row, around) for each column. `around` holds the lanes that start at
  // channel c of the 3 x 3 neighbourhood, as `reading` reads them: around[1][1] is at the index,
  // around[0] is the row above. Pixels outside the image are zero.
  template <typename Channels, typename Visit>
  inline __attribute__((always_inline)) void VisitColumns(int64_t c, const Channels& reading,
                                                          const Visit visit) const {
    Lanes around[3][3] = {};
    const auto move_to = [&](int64_t column) __attribute__((always_inline)) {
      for (int i = 0; i < 3; ++i) {
        around[i][0] = around[i][1];
        around[i][1] = around[i][2];
        around[i][2] = column + 1 < width_ && rows_[i]
                           ? reading.Read(LoadLanes(rows_[i] + (column + 1) * channels_ + c))
                           : Lanes{};
      }
    };
    move_to(-1);
    for (int64_t column = 0; column < width_; ++column) {
      move_to(column);
      const int64_t i = column * channels_ + c;
      // Hardware prefetching does not follow strides as large as a pixel.
      __builtin_prefetch(row_after_next_ + i);
      visit(i, around);
    }
  }

 private:
  const int64_t width_, channels_;
  const Value *rows_[3], *row_after_next_;
};

inline __attribute__((always_inline)) Lanes Product(const Lanes (&a)[3][3],
                                                    const Lanes (&b)[3][3]) {
  Lanes sums[3];
  for (int i = 0; i < 3; ++i) {
    sums[i] = a[i][0] * b[i][0] + a[i][1] * b[i][1] + a[i][2] * b[i][2];
  }
  return sums[0] + sums[1] + sums[2];
}

absl::Status CheckDepthwise(const Tensor& images, const Tensor& kernel) {
  if (const auto status = CheckSizes(images, {}); !status.ok()) return status;
  const int64_t channels = images.dim_size(3);
  if (channels < kLanes || kernel.shape() != TensorShape({3, 3, channels, 1})) {
    return absl::InvalidArgumentError(absl::StrCat(
        "images must have 16 channels or more, and the kernel must be 3 x 3 with as many, got ",
        images.shape().DebugString(), " and ", kernel.shape().DebugString()));
  }
  return absl::OkStatus();
}

// Writes output 0: a 3 x 3 depthwise convolution with stride 1 and padding SAME.
template <typename T, typename Reading>
void Convolve(OpKernelContext* context, const Tensor& images, const Tensor& kernel,
              const Reading& reading) {
  Tensor* output;
  OP_REQUIRES_OK(context, context->allocate_output(0, images.shape(), &output));
  const int64_t num_rows = images.dim_size(0) * images.dim_size(1);
  const int64_t channels = images.dim_size(3), row_size = images.dim_size(2) * channels;
  const auto* x = Values<T>(images);
  const float* weights = kernel.flat<float>().data();
  auto* y = Values<T>(output);
  InParallel(context, num_rows, row_size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Rows rows(images, x, row);
      auto* target = y + row * row_size;
      for (int64_t next = 0; next < channels; next += kLanes) {
        // The last lanes overlap the previous ones if channels is not a multiple of kLanes.
        const int64_t c = std::min(next, channels - kLanes);
        Lanes weight[3][3];
        for (int i = 0; i < 9; ++i) weight[i / 3][i % 3] = LoadLanes(weights + i * channels + c);
        rows.VisitColumns(c, reading.From(c), [&](int64_t i, const Lanes (&around)[3][3])
                                                  __attribute__((always_inline)) {
          StoreLanes(Product(weight, around), target + i);
        });
      }
    }
  });
}

// Convolves a row of the gradient with the rotated kernel; `reading` collects its sums.
template <typename Value, typename Channels>
void ConvolveBack(const Rows<Value>& rows_of_dy, const float* weights, int64_t channels, int64_t c,
                  const Value* x, Value* dx, Channels* reading) {
  Lanes weight[3][3];
  for (int i = 0; i < 9; ++i) weight[i / 3][i % 3] = LoadLanes(weights + (8 - i) * channels + c);
  Channels kept = *reading;  // in registers
  rows_of_dy.VisitColumns(c, Pixels(), [&](int64_t i, const Lanes (&around)[3][3])
                                           __attribute__((always_inline)) {
    StoreLanes(kept.PassBack(LoadLanes(x + i), Product(weight, around)), dx + i);
  });
  *reading = kept;
}

// Adds a row's share of the kernel gradient, [9, channels], except the first num_done lanes.
template <typename Value, typename Channels>
void AddKernelGradient(const Rows<Value>& rows_of_x, const Value* dy, int64_t channels, int64_t c,
                       int64_t num_done, const Channels& reading, float* sums) {
  Lanes sum[3][3] = {};
  rows_of_x.VisitColumns(c, reading, [&](int64_t index, const Lanes (&around)[3][3])
                                         __attribute__((always_inline)) {
    const Lanes value = LoadLanes(dy + index);
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) sum[i][j] += value * around[i][j];
    }
  });
  for (int i = 0; i < 9; ++i) AddLanes(sum[i / 3][i % 3], num_done, sums + i * channels + c);
}

// Writes the gradient of the images, as `reading` passes it back, and returns sums of shape
// [9 + Reading::kNumSums, channels]: the kernel gradient, then the sums of `reading`.
template <typename T, typename Reading>
std::vector<double> ConvolveGradient(OpKernelContext* context, const Tensor& gradient,
                                     const Tensor& images, const Tensor& kernel,
                                     const Reading& reading, Tensor* images_gradient) {
  constexpr int64_t kRows = 8;  // per partial sum
  const int64_t num_rows = images.dim_size(0) * images.dim_size(1);
  const int64_t channels = images.dim_size(3), row_size = images.dim_size(2) * channels;
  const int64_t parts = (num_rows + kRows - 1) / kRows;
  const int64_t num_sums = (9 + Reading::kNumSums) * channels;
  const auto *x = Values<T>(images), *dy = Values<T>(gradient);
  const float* weights = kernel.flat<float>().data();
  auto* dx = Values<T>(images_gradient);
  std::vector<float> sums(parts * num_sums);
  InParallel(context, parts, kRows * row_size * 2, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kRows; row < std::min(end * kRows, num_rows); ++row) {
      const Rows rows_of_x(images, x, row), rows_of_dy(images, dy, row);
      float* sums_of_part = &sums[row / kRows * num_sums];
      for (int64_t next = 0; next < channels; next += kLanes) {
        const int64_t c = std::min(next, channels - kLanes), num_done = next - c;
        auto channels_read = reading.From(c);
        ConvolveBack(rows_of_dy, weights, channels, c, x + row * row_size, dx + row * row_size,
                     &channels_read);
        AddKernelGradient(rows_of_x, dy + row * row_size, channels, c, num_done, channels_read,
                          sums_of_part);
        channels_read.AddSums(sums_of_part + 9 * channels + c, channels, num_done);
      }
    }
  });
  return AddRows(sums, num_sums);
}

// A 3 x 3 depthwise convolution with stride 1 and padding SAME of x, or of max(x, 0) if the
// attribute relu is true.
template <typename T>
class Depthwise : public OpKernel {
 public:
  explicit Depthwise(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &images = context->input(0), &kernel = context->input(1);
    OP_REQUIRES_OK(context, CheckDepthwise(images, kernel));
    relu_ ? Convolve<T>(context, images, kernel, RectifiedPixels())
          : Convolve<T>(context, images, kernel, Pixels());
  }

 private:
  bool relu_;
};

// The gradients of Depthwise with respect to x and the kernel.
template <typename T>
class DepthwiseGrad : public OpKernel {
 public:
  explicit DepthwiseGrad(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &gradient = context->input(0), &images = context->input(1);
    const Tensor& kernel = context->input(2);
    OP_REQUIRES_OK(context, CheckDepthwise(images, kernel));
    OP_REQUIRES(context, gradient.shape() == images.shape(),
                absl::InvalidArgumentError("gradient and images differ in shape"));
    Tensor *images_gradient, *kernel_gradient;
    OP_REQUIRES_OK(context, context->allocate_output(0, images.shape(), &images_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(1, kernel.shape(), &kernel_gradient));
    const auto sums = relu_ ? ConvolveGradient<T>(context, gradient, images, kernel,
                                                  RectifiedPixels(), images_gradient)
                            : ConvolveGradient<T>(context, gradient, images, kernel, Pixels(),
                                                  images_gradient);
    std::copy(sums.begin(), sums.end(), kernel_gradient->flat<float>().data());
  }

 private:
  bool relu_;
};

// BatchNorm, ReLU and Depthwise fused: the tensors between them are never stored.
template <typename T>
class BatchNormDepthwise : public OpKernel {
 public:
  explicit BatchNormDepthwise(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor &images = context->input(0), &kernel = context->input(3);
    OP_REQUIRES_OK(context, CheckDepthwise(images, kernel));
    const auto statistics = ComputeStatistics<T>(context, epsilon_);
    OP_REQUIRES_OK(context, statistics.status());
    Convolve<T>(context, images, kernel, NormalizedPixels(*statistics));
  }

 private:
  float epsilon_;
};

// The gradients of BatchNormDepthwise with respect to x, scale, offset and the kernel.
template <typename T>
class BatchNormDepthwiseGrad : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor &gradient = context->input(0), &images = context->input(1);
    const Tensor &scale = context->input(2), &offset = context->input(3);
    const Tensor &kernel = context->input(4), &mean = context->input(5);
    const Tensor& inverse_deviation = context->input(6);
    OP_REQUIRES_OK(context, CheckDepthwise(images, kernel));
    OP_REQUIRES_OK(context,
                   CheckSizes(images, {&scale, &offset, &mean, &inverse_deviation}));
    OP_REQUIRES(context, gradient.shape() == images.shape(),
                absl::InvalidArgumentError("gradient and images differ in shape"));
    Tensor *images_gradient, *scale_gradient, *offset_gradient, *kernel_gradient;
    OP_REQUIRES_OK(context, context->allocate_output(0, images.shape(), &images_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(1, scale.shape(), &scale_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(2, scale.shape(), &offset_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(3, kernel.shape(), &kernel_gradient));

    // images_gradient first holds the gradient of the batch norm's output, rounded to the images'
    // format; its sums are of the unrounded values.
    const auto statistics = StatisticsOf(mean, inverse_deviation, scale, offset);
    const auto sums = ConvolveGradient<T>(context, gradient, images, kernel,
                                          NormalizedPixels(statistics), images_gradient);
    const auto sums_of_pixels = sums.begin() + kernel.NumElements();
    std::copy(sums.begin(), sums_of_pixels, kernel_gradient->flat<float>().data());
    auto* dx = Values<T>(images_gradient);
    WriteGradients(
        context, statistics, &*sums_of_pixels, [=](int64_t i, int64_t) { return ToFloat(dx[i]); },
        images.NumElements() / images.dim_size(3), Values<T>(images), dx, scale_gradient,
        offset_gradient);
  }
};

absl::Status SetBatchNormShapes(InferenceContext* context) {
  ShapeHandle images;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &images));
  context->set_output(0, images);
  for (int i = 1; i < 4; ++i) context->set_output(i, context->Vector(context->Dim(images, 3)));
  return absl::OkStatus();
}

// Gradients have the shapes of the inputs, which follow the gradient of the output.
template <int num_gradients>
absl::Status SetGradientShapes(InferenceContext* context) {
  for (int i = 0; i < num_gradients; ++i) context->set_output(i, context->input(i + 1));
  return absl::OkStatus();
}

REGISTER_OP("XceptionBatchNorm")
    .Attr("T: {float, bfloat16}")
    .Attr("epsilon: float")
    .Attr("relu: bool")
    .Input("images: T")
    .Input("scale: float")
    .Input("offset: float")
    .Output("output: T")
    .Output("mean: float")
    .Output("variance: float")
    .Output("inverse_deviation: float")
    .SetShapeFn(SetBatchNormShapes);

REGISTER_OP("XceptionBatchNormDepthwise")
    .Attr("T: {float, bfloat16}")
    .Attr("epsilon: float")
    .Input("images: T")
    .Input("scale: float")
    .Input("offset: float")
    .Input("kernel: float")
    .Output("output: T")
    .Output("mean: float")
    .Output("variance: float")
    .Output("inverse_deviation: float")
    .SetShapeFn(SetBatchNormShapes);

REGISTER_OP("XceptionBatchNormDepthwiseGrad")
    .Attr("T: {float, bfloat16}")
    .Input("gradient: T")
    .Input("images: T")
    .Input("scale: float")
    .Input("offset: float")
    .Input("kernel: float")
    .Input("mean: float")
    .Input("inverse_deviation: float")
    .Output("images_gradient: T")
    .Output("scale_gradient: float")
    .Output("offset_gradient: float")
    .Output("kernel_gradient: float")
    .SetShapeFn(SetGradientShapes<4>);

REGISTER_OP("XceptionBatchNormGrad")
    .Attr("T: {float, bfloat16}")
    .Attr("relu: bool")
    .Input("gradient: T")
    .Input("images: T")
    .Input("scale: float")
    .Input("offset: float")
    .Input("mean: float")
    .Input("inverse_deviation: float")
    .Output("images_gradient: T")
    .Output("scale_gradient: float")
    .Output("offset_gradient: float")
    .SetShapeFn(SetGradientShapes<3>);

REGISTER_OP("XceptionDepthwise")
    .Attr("T: {float, bfloat16}")
    .Attr("relu: bool")
    .Input("images: T")
    .Input("kernel: float")
    .Output("output: T")
    .SetShapeFn([](InferenceContext* context) {
      context->set_output(0, context->input(0));
      return absl::OkStatus();
    });

REGISTER_OP("XceptionDepthwiseGrad")
    .Attr("T: {float, bfloat16}")
    .Attr("relu: bool")
    .Input("gradient: T")
    .Input("images: T")
    .Input("kernel: float")
    .Output("images_gradient: T")
    .Output("kernel_gradient: float")
    .SetShapeFn(SetGradientShapes<2>);

#define REGISTER(Kernel, T)                                                                     \
  REGISTER_KERNEL_BUILDER(                                                                      \
      Name("Xception" #Kernel).Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), Kernel<T>);
#define REGISTER_KERNEL(Kernel) \
  REGISTER(Kernel, float)       \
  REGISTER(Kernel, tensorflow::bfloat16)
REGISTER_KERNEL(BatchNorm)
REGISTER_KERNEL(BatchNormGrad)
REGISTER_KERNEL(BatchNormDepthwise)
REGISTER_KERNEL(BatchNormDepthwiseGrad)
REGISTER_KERNEL(Depthwise)
REGISTER_KERNEL(DepthwiseGrad)

}  // namespace
