// Decode and prefill attention over a paged cache, against softmax in double. The bound follows
// from what the kernels round: scores (sums of products in float), exponentials, the weights to 16
// bits, the result.
#include <fmt/format.h>

#include <cmath>

#include "kv_testing.h"
#include "model/rope.h"

namespace nibble::cuda::testing {
namespace {

struct Case {
  int64_t heads, kv_heads, head_dim;
  Element kv_type;
  Element type;  // of out
  int64_t window = 0;
};

constexpr Case kCases[] = {
    {8, 2, 128, Element::bf16, Element::bf16},      {4, 4, 64, Element::f16, Element::bf16},
    {14, 2, 64, Element::f16, Element::f16},        {4, 1, 256, Element::bf16, Element::bf16, 100},
    {4, 2, 128, Element::f16, Element::bf16, 1000}, {4, 2, 32, Element::f16, Element::f16},
    {16, 1, 128, Element::bf16, Element::f16, 64},  {2, 1, 80, Element::bf16, Element::bf16},
    {6, 2, 192, Element::f16, Element::f16},
};

double unit_of(Element type) { return type == Element::f16 ? 0x1p-11 : 0x1p-8; }

/// Rows of q, each of a sequence and at a position, and where their results go.
struct Queries {
  Case c;
  std::vector<int32_t> sequence, position;
  std::vector<uint16_t> q;
  Buffer device_q, device_sequence, device_position;
  mutable Buffer out;
  int64_t stride;

  Queries(const Case& a_case, std::vector<int32_t> s, std::vector<int32_t> p, std::mt19937& random)
      : Queries(a_case, s, p,
                random_bits(static_cast<int64_t>(s.size()) * a_case.heads * a_case.head_dim,
                            a_case.kv_type, 1.0f, random)) {}
  Queries(const Case& a_case, std::vector<int32_t> s, std::vector<int32_t> p,
          std::vector<uint16_t> bits)
      : c(a_case),
        sequence(std::move(s)),
        position(std::move(p)),
        q(std::move(bits)),
        device_q(q),
        device_sequence(sequence),
        device_position(position),
        out(q.size() * 2),
        stride(c.heads * c.head_dim) {}

  AttentionArgs args(const PagedCache& cache) const {
    AttentionArgs a;
    a.q = device_q.as<>();
    a.q_stride = a.out_stride = stride;
    a.heads = c.heads;
    a.kv = cache.pages();
    a.window = c.window;
    a.scale = scale();
    a.type = c.type;
    a.out = out.as<>();
    return a;
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(c.head_dim)); }
  std::vector<uint16_t> result() const {
    check_cuda(cudaDeviceSynchronize(), "attention");
    EXPECT_TRUE(out.guard_is_intact());
    return out.download<uint16_t>();
  }
};

/// Empty, or where a row of `found` is beyond the bound.
std::string compare_row(const Queries& queries, const PagedCache& cache, int64_t row,
                        const std::vector<uint16_t>& found) {
  const Case& c = queries.c;
  const int64_t last = queries.position[row], sequence = queries.sequence[row];
  const int64_t first = c.window > 0 ? std::max<int64_t>(0, last - c.window + 1) : 0;
  const int64_t count = last - first + 1;
  for (int64_t head = row % 2; head < c.heads; head += std::max<int64_t>(1, c.heads / 3)) {
    const int64_t kv_head = head / (c.heads / c.kv_heads);
    std::vector<double> weights(static_cast<size_t>(count));
    double top = -INFINITY, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      double score = 0, magnitude = 0;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        const double product =
            double{load_as_float(queries.q.data(), row * queries.stride + head * c.head_dim + d,
                                 static_cast<Dtype>(c.kv_type))} *
            cache.at(cache.keys, sequence, first + i, kv_head, d);
        score += product;
        magnitude += std::abs(product);
      }
      weights[i] = score * queries.scale();
      top = std::max(top, weights[i]);
      largest = std::max(largest, magnitude * queries.scale());
    }
    double sum = 0;
    for (double& w : weights) sum += w = std::exp(w - top);
    // Scores: every addition of a tensor core within 2^-22 of the magnitude; exponents: one
    // rounding each of the scaled score and maximum; the exponential itself; sums of weights.
    const double relative = largest * (static_cast<double>(c.head_dim) * 0x1p-23 + 0x1p-21) +
                            0x1p-20 + static_cast<double>(count) * 0x1p-23;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      double y = 0, magnitude = 0, most = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double v = cache.at(cache.values, sequence, first + i, kv_head, d);
        y += weights[i] * v / sum;
        magnitude += weights[i] * std::abs(v) / sum;
        most = std::max(most, std::abs(v));
      }
      // f16 weights below 2^-14 have a fixed unit; the largest of a split or tile is 1.
      const double small = c.kv_type == Element::f16 ? static_cast<double>(count) * 0x1p-25 : 0;
      const double bound = magnitude * (unit_of(c.kv_type) + 2 * relative) + small * most +
                           std::abs(y) * unit_of(c.type) + 0x1p-24;
      const double v = load_as_float(found.data(), row * queries.stride + head * c.head_dim + d,
                                     static_cast<Dtype>(c.type));
      if (!(std::abs(v - y) <= bound)) {
        return fmt::format("row {} (position {}) head {} channel {}: found {}, expected {} +- {}",
                           row, last, head, d, v, y, bound);
      }
    }
  }
  return {};
}

int multiprocessors() { return gpu().value().multiprocessors; }

void run_decode(const Queries& queries, const PagedCache& cache, const Buffer& scratch,
                int64_t max_context, int blocks = 0) {
  DecodeArgs args;
  args.attention = queries.args(cache);
  args.rows = static_cast<int64_t>(queries.position.size());
  args.sequence = queries.device_sequence.as<int32_t>();
  args.position = queries.device_position.as<int32_t>();
  args.max_context = max_context;
  args.scratch = scratch.as<>();
  args.multiprocessors = blocks > 0 ? blocks : multiprocessors();
  NIBBLE_CHECK_CUDA(launch_attention_decode(args, nullptr));
}

Buffer decode_scratch(const Case& c, int64_t rows, int64_t max_context) {
  return Buffer(static_cast<size_t>(decode_scratch_bytes(rows, c.heads, c.head_dim, max_context)),
                0);
}

TEST(CudaAttention, DecodeIsSoftmaxInDouble) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(11);
  for (const Case& c : kCases) {
    SCOPED_TRACE(
        fmt::format("heads {}/{} dim {} window {}", c.heads, c.kv_heads, c.head_dim, c.window));
    constexpr int64_t kContext = 1400;
    const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, 8, kContext, random);
    const Queries queries(c, {3, 0, 1, 2, 4, 5, 6, 7}, {0, 63, 64, 255, 256, 700, 1399, 1023},
                          random);
    const Buffer scratch = decode_scratch(c, 8, kContext);
    for (int turn = 0; turn < 2; ++turn) {  // the scratch is left as it must be found
      run_decode(queries, cache, scratch, kContext, turn == 0 ? 0 : 3);
      const std::vector<uint16_t> found = queries.result();
      for (int64_t row = 0; row < 8; ++row) {
        ASSERT_EQ(compare_row(queries, cache, row, found), "") << "turn " << turn;
      }
    }
    ASSERT_TRUE(scratch.guard_is_intact());
  }
}

TEST(CudaAttention, DecodeOfASequenceDoesNotDependOnTheOthers) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(12);
  for (const Case& c : {kCases[0], kCases[3]}) {
    constexpr int64_t kContext = 1400, kRows = 40;
    const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, kRows, kContext, random);
    std::vector<int32_t> sequence, position;
    for (int32_t i = 0; i < kRows; ++i) {
      sequence.push_back((i * 7) % kRows);
      position.push_back(i == 5 ? -1 : static_cast<int32_t>(random() % kContext));
    }
    const Queries all(c, sequence, position, random);
    const Buffer scratch = decode_scratch(c, kRows, kContext);
    run_decode(all, cache, scratch, kContext);
    const std::vector<uint16_t> found = all.result();
    all.out.fill(0xcc);
    run_decode(all, cache, scratch, kContext, 3);  // blocks of other numbers of warps
    ASSERT_EQ(all.result(), found);
    for (const int64_t row : {0, 17, 39}) {
      const auto first = all.q.begin() + row * all.stride;
      const Queries alone(c, {sequence[row]}, {position[row]},
                          std::vector<uint16_t>(first, first + all.stride));
      const auto begin = found.begin() + row * all.stride;
      for (const int blocks : {0, 5, 1}) {
        run_decode(alone, cache, scratch, kContext, blocks);
        ASSERT_EQ(alone.result(), std::vector<uint16_t>(begin, begin + all.stride)) << row;
      }
    }
    for (int64_t i = 0; i < all.stride; ++i) ASSERT_EQ(found[5 * all.stride + i], 0xcccc);
  }
}

struct RopeResult {
  std::vector<uint16_t> out, keys, values;
  std::vector<int32_t> faults;
};

/// A decoding step of rows of q, k and v: rope and attention in one launch or in two. The keys and
/// values of the rows' positions are not in the cache yet.
RopeResult decode_with_rope(const Case& c, bool together, uint32_t seed, int blocks = 0) {
  constexpr int64_t kContext = 1400;
  std::mt19937 random(seed);
  const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, 9, kContext, random);
  const Queries queries(c, {3, 0, 1, 2, 4, 5, 6, 7, 8}, {0, 63, 64, 255, 256, 700, 1399, 1023, -1},
                        random);
  const auto rows = static_cast<int64_t>(queries.position.size());
  const int64_t width = (c.heads + 2 * c.kv_heads) * c.head_dim;
  std::vector<uint16_t> qkv = random_bits(rows * width, c.kv_type, 1.0f, random);
  // What the cache cannot hold, in the key of row 2 and in a query of row 4.
  qkv[2 * width + c.heads * c.head_dim + 3] = c.kv_type == Element::f16 ? 0x7c00 : 0x7f80;
  qkv[4 * width + 5] = c.kv_type == Element::f16 ? 0x7e00 : 0x7fc0;
  std::vector<float> cosine(static_cast<size_t>(kContext * c.head_dim / 2)), sine(cosine.size());
  const std::vector<float> frequencies = rope_frequencies(RopeConfig{}, c.head_dim);
  for (int64_t p = 0; p < kContext; ++p) {
    rope_angles(frequencies, p, &cosine[p * c.head_dim / 2], &sine[p * c.head_dim / 2]);
  }
  const Buffer device_qkv(qkv), device_cosine(cosine), device_sine(sine), faults(9 * 4, 0);
  const Buffer scratch = decode_scratch(c, rows, kContext);
  RopeArgs rope;
  rope.type = c.kv_type;
  rope.qkv = device_qkv.as<>();
  rope.qkv_stride = width;
  rope.rows = rows;
  rope.heads = c.heads;
  rope.q = queries.device_q.as<>();
  rope.q_stride = queries.stride;
  rope.kv = cache.pages();
  rope.sequence = queries.device_sequence.as<int32_t>();
  rope.position = queries.device_position.as<int32_t>();
  rope.cosine = device_cosine.as<float>();
  rope.sine = device_sine.as<float>();
  rope.faults = faults.as<int32_t>();
  DecodeArgs args;
  args.attention = queries.args(cache);
  args.rows = rows;
  args.sequence = rope.sequence;
  args.position = rope.position;
  args.max_context = kContext;
  args.scratch = scratch.as<>();
  args.multiprocessors = blocks > 0 ? blocks : multiprocessors();
  if (together) {
    EXPECT_TRUE(decode_takes(rope));
    args.rope = rope;
  } else {
    NIBBLE_CHECK_CUDA(launch_rope(rope, nullptr));
  }
  NIBBLE_CHECK_CUDA(launch_attention_decode(args, nullptr));
  RopeResult result{queries.result(), cache.device_keys.download<uint16_t>(),
                    cache.device_values.download<uint16_t>(), faults.download<int32_t>()};
  EXPECT_TRUE(cache.device_keys.guard_is_intact() && cache.device_values.guard_is_intact() &&
              faults.guard_is_intact() && scratch.guard_is_intact());
  return result;
}

TEST(CudaAttention, DecodeWithRopeIsRopeAndThenDecode) {
  NIBBLE_NEEDS_GPU();
  for (const Case& c : kCases) {
    if (c.head_dim % kKvSlice != 0) continue;
    SCOPED_TRACE(
        fmt::format("heads {}/{} dim {} window {}", c.heads, c.kv_heads, c.head_dim, c.window));
    const RopeResult apart = decode_with_rope(c, false, 31);
    for (const int blocks : {0, 0, 3, 1}) {
      const RopeResult together = decode_with_rope(c, true, 31, blocks);
      ASSERT_EQ(together.out, apart.out);
      ASSERT_EQ(together.keys, apart.keys);
      ASSERT_EQ(together.values, apart.values);
      ASSERT_EQ(together.faults, apart.faults);
    }
    EXPECT_EQ(apart.faults, (std::vector<int32_t>{0, 1, 0, 0, 1, 0, 0, 0, 0}));
  }
}

/// Codes and scales of a decoding step, by the decode kernel itself or from what it gives.
struct StepCodes {
  std::vector<int8_t> codes;
  std::vector<float> scales;
};

StepCodes decode_to_codes(const Queries& queries, const PagedCache& cache, QuantizeArgs to,
                          bool together, int blocks) {
  const auto rows = static_cast<int64_t>(queries.position.size());
  const Buffer scratch = decode_scratch(queries.c, rows, 1400);
  to.type = queries.c.type;
  to.m = rows;
  to.k = to.padded_k = queries.stride;
  to.group_size = 128;
  const Buffer codes(static_cast<size_t>(rows * to.k));
  const Buffer scales(static_cast<size_t>(rows * queries.c.heads * 4));
  to.codes = codes.as<int8_t>();
  to.scales = scales.as<float>();
  DecodeArgs args;
  args.attention = queries.args(cache);
  args.rows = rows;
  args.sequence = queries.device_sequence.as<int32_t>();
  args.position = queries.device_position.as<int32_t>();
  args.max_context = 1400;
  args.scratch = scratch.as<>();
  args.multiprocessors = blocks > 0 ? blocks : multiprocessors();
  EXPECT_TRUE(decode_quantizes(args.attention, to));
  if (together) args.codes = to;
  NIBBLE_CHECK_CUDA(launch_attention_decode(args, nullptr));
  if (!together) {
    to.x = queries.out.as<>();
    to.x_stride = queries.stride;
    NIBBLE_CHECK_CUDA(launch_quantize(to, nullptr));
  }
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  EXPECT_TRUE(codes.guard_is_intact() && scales.guard_is_intact());
  return {codes.download<int8_t>(), scales.download<float>()};
}

/// Rows of one split and of several, one that is left out, and one with a NaN in a head.
TEST(CudaAttention, DecodeToCodesIsDecodeAndThenQuantize) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(32);
  for (const Case& c : {kCases[0], kCases[4], kCases[6]}) {
    const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, 8, 1400, random);
    const std::vector<int32_t> position = {0, 63, 200, -1, 256, 700, 1399, 1023};
    std::vector<uint16_t> bits = random_bits(8 * c.heads * c.head_dim, c.kv_type, 1.0f, random);
    bits[2 * c.heads * c.head_dim + c.head_dim] = c.kv_type == Element::f16 ? 0x7e00 : 0x7fc0;
    const Queries queries(c, {3, 0, 1, 2, 4, 5, 6, 7}, position, bits);
    for (int i = 0; i < 6; ++i) {
      SCOPED_TRACE(fmt::format("heads {}/{}, {}", c.heads, c.kv_heads, i));
      QuantizeArgs to;
      to.scaling = Scaling::group;
      to.wgmma_order = i % 2 == 1;
      to.symmetric = i / 2 != 1;
      to.limit = i / 2 == 0 ? 127 : i / 2 == 1 ? 15 : 7;
      to.clip = i / 2 == 2 ? 0.8f : 1.0f;
      queries.out.fill(0xcc);
      const StepCodes apart = decode_to_codes(queries, cache, to, false, 0);
      for (const int blocks : {0, 2}) {
        const StepCodes found = decode_to_codes(queries, cache, to, true, blocks);
        for (int64_t row = 0; row < 8; ++row) {
          for (int64_t k = 0; position[row] >= 0 && k < queries.stride; ++k) {
            const int64_t at = row * queries.stride + k;
            ASSERT_EQ(found.codes[at], apart.codes[at]) << "row " << row << ", k " << k;
          }
          for (int64_t head = 0; head < c.heads; ++head) {
            const float scale = found.scales[row * c.heads + head];
            const float expected = position[row] < 0 ? 0 : apart.scales[row * c.heads + head];
            ASSERT_TRUE(scale == expected || (std::isnan(scale) && std::isnan(expected)))
                << "row " << row << ", head " << head << ": " << scale << ", not " << expected;
          }
        }
        EXPECT_TRUE(std::isnan(found.scales[2 * c.heads + 1]));
      }
    }
  }
}

TEST(CudaAttention, NanInAQueryStaysInItsRow) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(13);
  const Case c = kCases[0];
  const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, 2, 600, random);
  std::vector<uint16_t> bits = random_bits(2 * c.heads * c.head_dim, c.kv_type, 1.0f, random);
  bits[5] = 0x7fc0;
  const Queries queries(c, {0, 1}, {599, 599}, bits);
  const Buffer scratch = decode_scratch(c, 2, 600);
  run_decode(queries, cache, scratch, 600);
  const std::vector<uint16_t> found = queries.result();
  EXPECT_TRUE(std::isnan(load_as_float(found.data(), 0, Dtype::bf16)));
  EXPECT_EQ(compare_row(queries, cache, 1, found), "");
}

/// Spans {sequence, position, count} of prompts; rows lie one after the other.
struct Prompt {
  int32_t sequence, position, count;
};

std::vector<uint16_t> run_prefill(const Queries& queries, const PagedCache& cache,
                                  const std::vector<Prompt>& prompts, bool wgmma) {
  std::vector<PrefillSpan> spans;
  int32_t row = 0;
  for (const Prompt& p : prompts) {
    spans.push_back({p.sequence, row, p.position, p.count});
    row += p.count;
  }
  const std::vector<PrefillTile> tiles = prefill_tiles(spans);
  const Buffer device_tiles(tiles);
  PrefillArgs args;
  args.attention = queries.args(cache);
  args.tiles = device_tiles.as<PrefillTile>();
  args.num_tiles = static_cast<int64_t>(tiles.size());
  args.wgmma = wgmma;
  NIBBLE_CHECK_CUDA(launch_attention_prefill(args, nullptr));
  return queries.result();
}

Queries queries_of(const Case& c, const std::vector<Prompt>& prompts, std::mt19937& random) {
  std::vector<int32_t> sequence, position;
  for (const Prompt& p : prompts) {
    for (int32_t i = 0; i < p.count; ++i) {
      sequence.push_back(p.sequence);
      position.push_back(p.position + i);
    }
  }
  return Queries(c, sequence, position, random);
}

bool has_wgmma() { return gpu().value().capability == 90; }

TEST(CudaAttention, PrefillIsSoftmaxInDouble) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(14);
  const std::vector<Prompt> prompts = {{1, 0, 1}, {0, 0, 300}, {2, 777, 130}, {3, 1000, 64}};
  for (const Case& c : kCases) {
    const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, 4, 1064, random);
    const Queries queries = queries_of(c, prompts, random);
    for (const bool wgmma : {false, true}) {
      if (wgmma && !has_wgmma()) continue;
      SCOPED_TRACE(fmt::format("heads {}/{} dim {} window {} wgmma {}", c.heads, c.kv_heads,
                               c.head_dim, c.window, wgmma));
      const std::vector<uint16_t> found = run_prefill(queries, cache, prompts, wgmma);
      for (int64_t row = 0; row < static_cast<int64_t>(queries.position.size());
           row += row < 2 || row > 425 ? 1 : 23) {
        ASSERT_EQ(compare_row(queries, cache, row, found), "");
      }
    }
  }
}

TEST(CudaAttention, PrefillOfARowDoesNotDependOnTheCut) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(15);
  for (const Case& c : {kCases[0], kCases[3], kCases[4], kCases[6]}) {
    const PagedCache cache(c.kv_type, c.kv_heads, c.head_dim, 2, 1300, random);
    const std::vector<Prompt> whole = {{1, 0, 1300}};
    const Queries queries = queries_of(c, whole, random);
    for (const bool wgmma : {false, true}) {
      if (wgmma && !has_wgmma()) continue;
      const std::vector<uint16_t> found = run_prefill(queries, cache, whole, wgmma);
      queries.out.fill(0xcc);
      const std::vector<Prompt> cut = {{1, 0, 1},     {1, 1, 7},     {1, 8, 300},
                                       {1, 308, 129}, {1, 437, 100}, {1, 537, 763}};
      ASSERT_EQ(run_prefill(queries, cache, cut, wgmma), found) << "wgmma " << wgmma;
    }
  }
}

TEST(CudaAttention, TilesCoverTheSpansLongestFirst) {
  const std::vector<PrefillTile> tiles = prefill_tiles({{2, 0, 5, 130}, {7, 130, 0, 300}});
  ASSERT_EQ(tiles.size(), 5u);
  EXPECT_EQ(tiles[0].position + tiles[0].count, 300);
  EXPECT_EQ(tiles[0].row, 130 + 256);
  int32_t rows = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    rows += tiles[i].count;
    EXPECT_EQ(tiles[i].row - tiles[i].position, tiles[i].sequence == 2 ? -5 : 130);
    if (i > 0) {
      EXPECT_LE(tiles[i].position + tiles[i].count, tiles[i - 1].position + tiles[i - 1].count);
    }
  }
  EXPECT_EQ(rows, 430);
}

TEST(CudaAttention, RefusesWhatItCannotDo) {
  DecodeArgs decode;
  EXPECT_EQ(launch_attention_decode(decode, nullptr), cudaErrorInvalidValue);
  PrefillArgs prefill;
  EXPECT_EQ(launch_attention_prefill(prefill, nullptr), cudaErrorInvalidValue);
  auto* somewhere = reinterpret_cast<int32_t*>(256);  // not looked at
  AttentionArgs& a = decode.attention;
  a.q = a.out = a.kv.keys = a.kv.values = decode.scratch = somewhere;
  a.kv.page_table = somewhere;
  a.q_stride = a.out_stride = 512;
  a.heads = 4;
  a.scale = 1;
  a.kv.kv_heads = 2;
  a.kv.head_dim = 100;
  a.kv.page_stride = page_elements(2, 128);
  a.kv.max_pages = 4;
  decode.rows = 1;
  decode.max_context = 100;
  decode.multiprocessors = 1;
  EXPECT_EQ(launch_attention_decode(decode, nullptr), cudaErrorInvalidValue);  // head_dim
  a.kv.head_dim = 128;
  decode.max_context = 257;
  EXPECT_EQ(launch_attention_decode(decode, nullptr), cudaErrorInvalidValue);  // of 256
  decode.max_context = 256;
  decode.rows = 1025;
  EXPECT_EQ(launch_attention_decode(decode, nullptr), cudaErrorInvalidValue);
  decode.rows = 1;
  decode.codes.codes = reinterpret_cast<int8_t*>(256);
  decode.codes.scales = reinterpret_cast<float*>(256);
  decode.codes.k = decode.codes.padded_k = 512;
  decode.codes.group_size = 128;
  EXPECT_EQ(launch_attention_decode(decode, nullptr), cudaErrorInvalidValue);  // one scale a row
  decode.codes.scaling = Scaling::group;
  decode.codes.group_size = 64;
  EXPECT_EQ(launch_attention_decode(decode, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nibble::cuda::testing
