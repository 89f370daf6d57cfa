// See pass_inputs.h.
#include "model/cuda/pass_inputs.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kArrays = 4;

}  // namespace

Result<std::unique_ptr<PassStaging>> PassStaging::create(const DeviceInfo& device, int64_t rows) {
  std::unique_ptr<PassStaging> s(new PassStaging);
  s->capacity_ = (rows + 3) / 4 * 4;
  // In the worst case every row is a tile of its own.
  const size_t bytes =
      static_cast<size_t>(s->capacity_) * (kArrays * sizeof(int32_t) + sizeof(PrefillTile));
  NIBBLE_TRY(s->device_.allocate_zeroed(bytes, device));
  NIBBLE_TRY(s->argmax_scratch_.allocate_zeroed(
      static_cast<size_t>(argmax_scratch_bytes(s->capacity_)), device));
  const size_t rules_bytes = static_cast<size_t>(s->capacity_) * sizeof(sampling::Rule);
  NIBBLE_TRY(s->rules_.allocate_zeroed(rules_bytes, device));
  const auto pin = [](auto*& to, size_t size) {
    void* memory = nullptr;
    const cudaError_t error = cudaMallocHost(&memory, size);
    to = static_cast<std::remove_reference_t<decltype(to)>>(memory);
    return to_status(error, "cudaMallocHost");
  };
  NIBBLE_TRY(pin(s->host_, bytes));
  NIBBLE_TRY(pin(s->host_rules_, rules_bytes));
  NIBBLE_TRY(pin(s->results_, 2 * kTurns * static_cast<size_t>(s->capacity_) * sizeof(int32_t)));
  return s;
}

PassStaging::~PassStaging() {
  if (host_ != nullptr) (void)cudaFreeHost(host_);
  if (host_rules_ != nullptr) (void)cudaFreeHost(host_rules_);
  if (results_ != nullptr) (void)cudaFreeHost(results_);
}

Result<PassInputs> PassStaging::stage(std::span<const SequenceItem> items,
                                      std::span<const PassSpan> spans, int64_t step_rows,
                                      cudaStream_t stream) {
  int32_t* const tokens = host_;
  int32_t* const sequence = host_ + capacity_;
  int32_t* const position = host_ + 2 * capacity_;
  int32_t* const gather = host_ + 3 * capacity_;
  std::vector<PrefillSpan> prefill;
  for (size_t i = 0; i < spans.size(); ++i) {
    const PassSpan& span = spans[i];
    const SequenceItem& item = items[span.item];
    const auto slot = static_cast<const PagedSequence*>(item.cache)->slot();
    const auto start = static_cast<int32_t>(item.cache->length());
    for (int64_t j = 0; j < span.count; ++j) {
      tokens[span.row + j] = item.tokens[static_cast<size_t>(span.first + j)];
      sequence[span.row + j] = slot;
      position[span.row + j] = start + static_cast<int32_t>(j);
    }
    gather[i] = static_cast<int32_t>(span.row + span.count - 1);
    prefill.push_back(
        {slot, static_cast<int32_t>(span.row), start, static_cast<int32_t>(span.count)});
  }
  const int64_t taken = spans.back().row + spans.back().count;
  for (int64_t row = taken; row < step_rows; ++row) {
    tokens[row] = sequence[row] = 0;
    position[row] = -1;
  }
  const auto rows = static_cast<size_t>(std::max(taken, step_rows));
  const size_t pitch = static_cast<size_t>(capacity_) * sizeof(int32_t);
  NIBBLE_TRY(
      to_status(cudaMemcpy2DAsync(device_.as<>(), pitch, host_, pitch, rows * sizeof(int32_t),
                                  kArrays, cudaMemcpyHostToDevice, stream),
                "copying tokens"));
  PassInputs inputs = decode_inputs();
  if (step_rows > 0) return inputs;
  const std::vector<PrefillTile> tiles = prefill_tiles(prefill);
  auto* host_tiles = reinterpret_cast<PrefillTile*>(host_ + kArrays * capacity_);
  auto* device_tiles = reinterpret_cast<PrefillTile*>(device_.as<int32_t>() + kArrays * capacity_);
  std::memcpy(host_tiles, tiles.data(), tiles.size() * sizeof(PrefillTile));
  NIBBLE_TRY(to_status(cudaMemcpyAsync(device_tiles, host_tiles, tiles.size() * sizeof(PrefillTile),
                                       cudaMemcpyHostToDevice, stream),
                       "copying tiles"));
  inputs.tiles = device_tiles;
  inputs.num_tiles = static_cast<int64_t>(tiles.size());
  return inputs;
}

Status PassStaging::stage_rules(std::span<const SamplerOptions> how, int64_t rows,
                                cudaStream_t stream) {
  for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
    host_rules_[row] = row < how.size() ? sampling_rule(how[row]) : sampling::Rule();
  }
  return to_status(cudaMemcpyAsync(rules_.as<>(), host_rules_,
                                   static_cast<size_t>(rows) * sizeof(sampling::Rule),
                                   cudaMemcpyHostToDevice, stream),
                   "copying how to sample");
}

Status PassStaging::fetch_chosen(int64_t count, int turn, cudaStream_t stream) {
  return to_status(
      cudaMemcpyAsync(results_ + 2 * turn * capacity_, chosen(),
                      static_cast<size_t>(count) * sizeof(int32_t), cudaMemcpyDeviceToHost, stream),
      "copying tokens");
}

Status PassStaging::fetch_faults(const int32_t* faults, int64_t sequences, int turn,
                                 cudaStream_t stream) {
  return to_status(cudaMemcpyAsync(results_ + (2 * turn + 1) * capacity_, faults,
                                   static_cast<size_t>(sequences) * sizeof(int32_t),
                                   cudaMemcpyDeviceToHost, stream),
                   "copying faults");
}

}  // namespace nibble::cuda
