// The host's part of prefill attention: tiles of a batch, and the kernel for the device.
#include "model/cuda/attention_prefill.h"

#include <algorithm>

#include "model/cuda/check.h"

namespace nibble::cuda {

std::vector<PrefillTile> prefill_tiles(const std::vector<PrefillSpan>& spans) {
  std::vector<PrefillTile> tiles;
  for (const PrefillSpan& span : spans) {
    for (int32_t done = 0; done < span.count; done += kPrefillRows) {
      tiles.push_back({span.sequence, span.row + done, span.position + done,
                       std::min(kPrefillRows, span.count - done)});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const PrefillTile& a, const PrefillTile& b) {
    return a.position + a.count > b.position + b.count;
  });
  return tiles;
}

cudaError_t launch_attention_prefill(const PrefillArgs& args, cudaStream_t stream) {
  if (!attention_is_valid(args.attention) || args.tiles == nullptr || args.num_tiles < 1 ||
      args.num_tiles > 65535) {
    return cudaErrorInvalidValue;
  }
  return args.wgmma ? launch_attention_prefill_sm90(args, stream)
                    : launch_attention_prefill_sm80(args, stream);
}

}  // namespace nibble::cuda
