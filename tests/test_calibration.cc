// Activation statistics: right by a naive count, the same bits however the work is cut, merged,
// saved or spread over threads, and files that were tampered with.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "checkpoint_builder.h"
#include "format/safetensors.h"
#include "model/calibration.h"

namespace nibble {
namespace {

using test::TempDir;

constexpr int64_t kChannels[kSlots] = {64, 32, 64, 96};
constexpr int64_t kGroupSize = 16, kLayers = 2;

Calibration empty_calibration(const std::string& digest = "model") {
  std::vector<SlotStatistics> slots;
  for (int64_t i = 0; i < kLayers * kSlots; ++i)
    slots.emplace_back(kChannels[i % kSlots], kGroupSize);
  return Calibration(digest, std::move(slots));
}

/// Values whose sums in double depend on their order.
std::vector<float> random_values(size_t count, uint64_t seed) {
  std::vector<float> values(count);
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (float& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const int exponent = static_cast<int>(state >> 59) - 20;
    value = std::ldexp(static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-31f, exponent);
  }
  return values;
}

void add_chunk(Calibration& calibration, uint64_t seed, int64_t rows, int threads = 1) {
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    for (int s = 0; s < kSlots; ++s) {
      const auto x = random_values(static_cast<size_t>(rows * kChannels[s]),
                                   seed * 100 + static_cast<uint64_t>(layer * kSlots + s));
      const Status status =
          calibration.add(layer, static_cast<Slot>(s), x.data(), rows, kChannels[s], threads);
      ASSERT_TRUE(status.ok()) << status.message();
    }
  }
}

/// A run over chunks [first, last) of a text.
void add_text(Calibration& calibration, uint64_t text, int64_t first, int64_t last,
              int threads = 1) {
  const std::string digest = "digest of " + std::to_string(text);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    add_chunk(calibration, text * 1000 + static_cast<uint64_t>(chunk), 5 + chunk % 3, threads);
    calibration.text(digest) = {"text", digest, 8, chunk + 1, 10};
  }
}

Calibration saved_and_loaded(const Calibration& calibration) {
  TempDir dir;
  EXPECT_TRUE(calibration.save(dir.file("stats.safetensors")).ok());
  auto loaded = Calibration::load(dir.file("stats.safetensors"));
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  return std::move(*loaded);
}

std::string file_bytes(const Calibration& calibration) {
  TempDir dir;
  EXPECT_TRUE(calibration.save(dir.file("stats.safetensors")).ok());
  return test::read_text(dir.file("stats.safetensors"));
}

TEST(Calibration, CountsAreRight) {
  Calibration calibration = empty_calibration();
  constexpr int64_t kRows = 7;
  const auto x = random_values(kRows * kChannels[3], 3);
  ASSERT_TRUE(calibration.add(1, Slot::down, x.data(), kRows, kChannels[3], 2).ok());
  const SlotStatistics& s = calibration.at(1, Slot::down);
  EXPECT_EQ(s.tokens, 7u);
  double fourth = 0;
  for (int64_t c = 0; c < s.channels; ++c) {
    double sum = 0, squares = 0;
    float largest = 0, low = x[static_cast<size_t>(c)], high = low;
    for (int64_t r = 0; r < kRows; ++r) {
      const float value = x[static_cast<size_t>(r * s.channels + c)];
      sum += std::fabs(value);
      squares += static_cast<double>(value) * value;
      fourth += std::pow(static_cast<double>(value), 4);
      largest = std::max(largest, std::fabs(value));
      low = std::min(low, value);
      high = std::max(high, value);
    }
    const auto i = static_cast<size_t>(c);
    EXPECT_NEAR(s.sum_abs[i].value(), sum, 1e-12 * sum);
    EXPECT_NEAR(s.sum_squares[i].value(), squares, 1e-12 * squares);
    EXPECT_EQ(s.max_abs[i], largest);
    EXPECT_EQ(s.minimum[i], low);
    EXPECT_EQ(s.maximum[i], high);
  }
  EXPECT_NEAR(s.sum_fourth.value(), fourth, 1e-9 * fourth);
  for (int64_t g = 0; g < s.groups(); ++g) {
    double sum = 0;
    std::vector<uint64_t> bins(kHistogramBins);
    for (int64_t r = 0; r < kRows; ++r) {
      float largest = 0;
      for (int64_t c = g * kGroupSize; c < (g + 1) * kGroupSize; ++c) {
        largest = std::max(largest, std::fabs(x[static_cast<size_t>(r * s.channels + c)]));
      }
      sum += largest;
      ++bins[static_cast<size_t>(histogram_bin(largest))];
    }
    EXPECT_NEAR(s.sum_group_amax[static_cast<size_t>(g)].value(), sum, 1e-12 * sum);
    EXPECT_TRUE(std::equal(bins.begin(), bins.end(), s.group_amax.begin() + g * kHistogramBins));
  }
  EXPECT_EQ(std::accumulate(s.token_amax.begin(), s.token_amax.end(), uint64_t{0}), 7u);
}

TEST(Calibration, HistogramEdgesHoldTheirValues) {
  rc::check([] {
    const float value =
        std::ldexp(1.0f + static_cast<float>(*rc::gen::inRange(0, 1 << 20)) * 0x1p-20f,
                   *rc::gen::inRange(-19, 19));
    const int bin = histogram_bin(value);
    RC_ASSERT(value < histogram_upper_edge(bin));
    RC_ASSERT(value >= histogram_upper_edge(bin - 1));
    RC_ASSERT(histogram_upper_edge(bin) <= histogram_upper_edge(bin - 1) * 1.126f);
  });
  EXPECT_EQ(histogram_bin(0), 0);
  EXPECT_EQ(histogram_bin(1e-30f), 0);
  EXPECT_EQ(histogram_bin(1e30f), kHistogramBins - 1);
  EXPECT_EQ(histogram_quantile(std::vector<uint64_t>(kHistogramBins), 0.5), 0);
}

TEST(Calibration, SumsAreExactInAnyOrder) {
  rc::check([] {
    const auto values = random_values(static_cast<size_t>(*rc::gen::inRange(1, 50)),
                                      *rc::gen::arbitrary<uint32_t>());
    Sum forward, backward, parts[2];
    for (const float value : values) forward.add(value);
    for (size_t i = values.size(); i-- > 0;) backward.add(values[i]);
    for (size_t i = 0; i < values.size(); ++i) parts[i % 2].add(values[i]);
    parts[0].add(parts[1]);
    RC_ASSERT(forward == backward);
    RC_ASSERT(forward == parts[0]);
    Sum restored;
    RC_ASSERT(restored.set(forward.value(), forward.remainder()));
    RC_ASSERT(restored == forward);
  });
  Sum sum;
  sum.add(1e300);  // beyond the range: stays at its end
  sum.add(1e300);
  for (int i = 0; i < 10; ++i) sum.add(Sum(sum));
  EXPECT_GT(sum.value(), 1e19);
  EXPECT_FALSE(Sum().set(NAN, 0));
  EXPECT_FALSE(Sum().set(0x1p-61, 0));
  EXPECT_FALSE(Sum().set(1, 1));
}

TEST(Calibration, MergeEqualsOneRunOverBothTextsInAnyOrder) {
  rc::check([] {
    const int64_t chunks_a = *rc::gen::inRange(1, 4), chunks_b = *rc::gen::inRange(1, 4);
    Calibration both = empty_calibration(), a = empty_calibration(), b = empty_calibration();
    add_text(both, 1, 0, chunks_a);
    add_text(both, 2, 0, chunks_b);
    add_text(a, 1, 0, chunks_a);
    add_text(b, 2, 0, chunks_b);
    Calibration ab = a, ba = b;
    RC_ASSERT(ab.merge(b).ok());
    RC_ASSERT(ba.merge(a).ok());
    RC_ASSERT(ab == both);
    RC_ASSERT(ba == both);
  });
}

TEST(Calibration, MergedFilesAreTheFileOfOneRun) {
  Calibration both = empty_calibration(), a = empty_calibration(), b = empty_calibration();
  add_text(both, 2, 0, 3);
  add_text(both, 1, 0, 2);
  add_text(a, 1, 0, 2);
  add_text(b, 2, 0, 3);
  Calibration ab = saved_and_loaded(a), ba = saved_and_loaded(b);
  ASSERT_TRUE(ab.merge(ba).ok());
  ASSERT_TRUE(ba.merge(a).ok());
  EXPECT_EQ(file_bytes(ab), file_bytes(both));
  EXPECT_EQ(file_bytes(ba), file_bytes(both));
}

TEST(Calibration, ResumedRunEqualsOneRun) {
  Calibration whole = empty_calibration();
  add_text(whole, 1, 0, 6);
  for (int64_t stop = 0; stop <= 6; ++stop) {
    Calibration part = empty_calibration();
    add_text(part, 1, 0, stop);
    Calibration resumed = saved_and_loaded(part);
    add_text(resumed, 1, stop, 6);
    EXPECT_TRUE(resumed == whole);
    EXPECT_EQ(file_bytes(resumed), file_bytes(whole));
  }
}

TEST(ThreadCalibration, ThreadsDoNotChangeABit) {
  Calibration one = empty_calibration(), many = empty_calibration();
  add_text(one, 1, 0, 3, 1);
  add_text(many, 1, 0, 3, 4);
  EXPECT_TRUE(one == many);
}

TEST(Calibration, MergeRefusesWhatDoesNotBelongTogether) {
  Calibration a = empty_calibration();
  add_text(a, 1, 0, 1);
  const Calibration before = a;
  const auto refusal = [&](const Calibration& other) {
    const Status status = a.merge(other);
    EXPECT_EQ(status.code(), Code::invalid_argument);
    EXPECT_TRUE(a == before);
    return status.message();
  };
  EXPECT_NE(refusal(a).find("in both"), std::string::npos);
  EXPECT_NE(refusal(empty_calibration("other")).find("model"), std::string::npos);
  std::vector<SlotStatistics> slots(kLayers * kSlots, SlotStatistics(64, 32));
  EXPECT_NE(refusal(Calibration("model", slots)).find("groups of 16"), std::string::npos);
  slots.resize(kSlots);
  EXPECT_NE(refusal(Calibration("model", slots)).find("2 layers"), std::string::npos);
}

TEST(Calibration, BadInputIsRefused) {
  Calibration calibration = empty_calibration();
  std::vector<float> x(3 * 64, 1.0f);
  EXPECT_EQ(calibration.add(0, Slot::down, x.data(), 3, 64, 1).code(), Code::invalid_argument);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    x[64 + 20] = bad;
    const Status status = calibration.add(0, Slot::qkv, x.data(), 3, 64, 1);
    EXPECT_EQ(status.code(), Code::non_finite);
    EXPECT_NE(status.message().find("layer 0, qkv: NaN or infinity in row 1, channels 16 to 31"),
              std::string::npos)
        << status.message();
  }
}

TEST(Calibration, StaticScalesCoverTheRange) {
  Calibration calibration = empty_calibration();
  std::vector<float> x(100 * 64);
  for (int64_t r = 0; r < 100; ++r) {
    for (int64_t c = 0; c < 64; ++c) {
      const bool outlier = r == 50 && c == 20;
      x[static_cast<size_t>(r * 64 + c)] = outlier ? 100.0f : static_cast<float>(c / kGroupSize);
    }
  }
  ASSERT_TRUE(calibration.add(0, Slot::qkv, x.data(), 100, 64, 1).ok());
  const SlotStatistics& s = calibration.at(0, Slot::qkv);
  const auto scales = [&](Mode mode, Granularity granularity, double percentile) {
    const auto result = static_scales(s, mode, granularity, percentile);
    EXPECT_TRUE(result.ok());
    return *result;
  };
  EXPECT_EQ(scales(Mode::w4a8, Granularity::static_tensor, 100),
            std::vector<float>{100.0f / 127.0f});
  const auto groups = scales(Mode::w4a4, Granularity::static_group, 100);
  ASSERT_EQ(groups.size(), 4u);
  EXPECT_GT(groups[0], 0);  // all zeros, still a scale
  EXPECT_EQ(groups[1], 100.0f / 7.0f);
  EXPECT_EQ(groups[3], 3.0f / 7.0f);
  // A percentile leaves the one outlier out.
  const float most = scales(Mode::w4a8, Granularity::static_tensor, 98)[0] * 127.0f;
  EXPECT_GE(most, 3.0f);
  EXPECT_LE(most, 3.0f * 1.126f);
  EXPECT_EQ(static_scales(s, Mode::w4a16, Granularity::static_tensor, 100).status().code(),
            Code::invalid_argument);
  EXPECT_EQ(static_scales(s, Mode::w4a8, Granularity::token, 100).status().code(),
            Code::invalid_argument);
  EXPECT_EQ(static_scales(s, Mode::w4a8, Granularity::static_tensor, 0).status().code(),
            Code::invalid_argument);
  EXPECT_EQ(static_scales(calibration.at(0, Slot::o), Mode::w4a8, Granularity::static_tensor, 100)
                .status()
                .code(),
            Code::invalid_argument);
}

TEST(Calibration, ClipIsTheRatioOfLeastError) {
  // A group with one value a little above many: clipping it helps. Values on the grid: it hurts.
  Calibration calibration = empty_calibration();
  std::vector<float> x(8 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 16);
  ASSERT_TRUE(calibration.add(0, Slot::qkv, x.data(), 8, 64, 1).ok());
  EXPECT_EQ(best_clip(calibration.at(0, Slot::qkv)), 1.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 16 == 0 ? 1.1f : static_cast<float>(i % 16) / 15;
  ASSERT_TRUE(calibration.add(0, Slot::gate_up, x.data(), 8, 64, 1).ok());
  EXPECT_LT(best_clip(calibration.at(0, Slot::gate_up)), 1.0f);
  EXPECT_EQ(best_clip(calibration.at(1, Slot::qkv)), 1.0f);  // nothing counted
}

TEST(Calibration, SummaryShowsOutlierChannels) {
  Calibration calibration = empty_calibration();
  std::vector<float> x(10 * 64, 1.0f);
  for (int64_t r = 0; r < 10; ++r) x[static_cast<size_t>(r * 64 + 5)] = -60.0f;
  ASSERT_TRUE(calibration.add(0, Slot::qkv, x.data(), 10, 64, 1).ok());
  const SlotSummary summary = summarize(calibration.at(0, Slot::qkv));
  EXPECT_EQ(summary.amax, 60.0f);
  EXPECT_EQ(summary.token_median, 60.0f);
  EXPECT_EQ(summary.channel_ratio, 60);
  const double mean = (63 + 3600.0) / 64, fourth = (63 + 3600.0 * 3600.0) / 64;
  EXPECT_NEAR(summary.kurtosis, fourth / (mean * mean), 1e-6);
}

// ---- files -------------------------------------------------------------------------------------

TEST(CalibrationFile, TamperedFilesAreRefusedByName) {
  TempDir dir;
  const std::string path = dir.file("stats.safetensors");
  Calibration calibration = empty_calibration();
  add_text(calibration, 1, 0, 2);
  ASSERT_TRUE(calibration.save(path).ok());
  const auto file = MappedFile::open(path);
  ASSERT_TRUE(file.ok());
  const auto index = parse_safetensors(file->bytes(), path);
  ASSERT_TRUE(index.ok());

  const std::string prefix = "nibble.calibration.layers.1.o.";
  const auto refusal = [&](const TensorMap& tensors,
                           const std::map<std::string, std::string>& metadata, Code code) {
    const std::string bad = dir.file("bad.safetensors");
    EXPECT_TRUE(write_safetensors(bad, tensors, metadata).ok());
    const auto loaded = Calibration::load(bad);
    EXPECT_EQ(loaded.status().code(), code) << loaded.status().message();
    return loaded.status().message();
  };
  const auto with_bytes = [&](const std::string& name, size_t offset, std::vector<std::byte>& copy,
                              const void* data, size_t bytes) {
    TensorMap tensors = index->tensors;
    TensorView& view = tensors.at(name);
    copy.assign(view.data, view.data + view.bytes);
    std::memcpy(copy.data() + offset, data, bytes);
    view.data = copy.data();
    return tensors;
  };
  std::vector<std::byte> copy;
  for (const auto& [name, view] : index->tensors) {
    TensorMap tensors = index->tensors;
    tensors.erase(name);
    refusal(tensors, index->metadata, Code::corrupt_file);
  }
  const double bad_sum = -1, nan = NAN;
  const uint64_t bad_count = ~uint64_t{0};
  const float infinite = std::numeric_limits<float>::infinity();
  for (const double* value : {&bad_sum, &nan}) {
    const auto message = refusal(with_bytes(prefix + "channel_sum_abs", 8, copy, value, 8),
                                 index->metadata, Code::corrupt_file);
    EXPECT_NE(message.find(prefix + "channel_sum_abs: element 1"), std::string::npos) << message;
  }
  refusal(with_bytes(prefix + "token_amax_histogram", 80, copy, &bad_count, 8), index->metadata,
          Code::corrupt_file);
  refusal(with_bytes(prefix + "channel_max_abs", 4, copy, &infinite, 4), index->metadata,
          Code::corrupt_file);
  for (size_t field = 0; field < 4; ++field) {
    for (const int64_t value : {int64_t{-1}, int64_t{7}, int64_t{1} << 60}) {
      if (field == 3 && value > 0) continue;  // rows of the clip search: any count
      refusal(with_bytes(prefix + "counts", 8 * field, copy, &value, 8), index->metadata,
              Code::corrupt_file);
    }
  }
  auto metadata = index->metadata;
  metadata["schema_version"] = "2";
  refusal(index->tensors, metadata, Code::corrupt_file);
  metadata = index->metadata;
  metadata.erase("format");
  EXPECT_NE(refusal(index->tensors, metadata, Code::invalid_argument).find("calibrate"),
            std::string::npos);
  for (const char* texts : {"", "{", "3", "[3]", "[{}]", R"([{"name": "a", "sha256": "b",
       "context": -1, "chunks_done": 0, "chunks_total": 0}])"}) {
    metadata = index->metadata;
    metadata["texts"] = texts;
    refusal(index->tensors, metadata, Code::corrupt_file);
  }
  EXPECT_EQ(Calibration::load(dir.file("absent")).status().code(), Code::io_error);
}

}  // namespace
}  // namespace nibble
