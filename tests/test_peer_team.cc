// Peers of a GPU without one: what the team hands to a worker that takes a checkpoint, and how its
// answers are checked (fake_peer.py).
#include <gtest/gtest.h>

#include <filesystem>

#include "checkpoint_builder.h"
#include "peer_team.h"
#include "synthetic.h"

namespace nibble::cli {
namespace {

constexpr int64_t kK = 256, kRows = 3;

PeerSpec fake(const test::TempDir& dir, const std::string& name) {
  std::filesystem::create_symlink(NIBBLE_FAKE_PEER, dir.file(name));
  return {name, {dir.file(name)}};
}

/// 24 columns, of which the middle eight are checked.
struct Weight {
  AwqTensors all = make_synthetic_weight({.name = "w", .k = kK, .n = 24}, 1);
  AwqTensors middle = middle_of(all);
  ref::Weights sample = ref::unpack(middle.view());
  std::vector<int64_t> columns = {8, 9, 10, 11, 12, 13, 14, 15};
  std::vector<float> x = make_input(InputKind::normal, kRows, kK, 1);

  static AwqTensors middle_of(const AwqTensors& all) {
    AwqTensors t;
    t.k = all.k, t.n = 8, t.group_size = all.group_size, t.scale_dtype = all.scale_dtype;
    for (int64_t k = 0; k < all.k; ++k) t.qweight.push_back(all.qweight[3 * k + 1]);
    for (int64_t g = 0; g < all.k / all.group_size; ++g) {
      t.qzeros.push_back(all.qzeros[3 * g + 1]);
      for (int64_t c = 8; c < 16; ++c) t.scales.push_back(all.scales[24 * g + c]);
    }
    return t;
  }
};

TEST(PeerTeam, AWorkerOfAGpuGetsTheCheckpointAndAnswersForSamples) {
  const test::TempDir dir;
  const Weight weight;
  PeerTeam team({fake(dir, "works-on-cuda")}, "cuda", 1, 20);
  ASSERT_TRUE(team.prepare(weight.all, weight.sample, weight.columns).ok());
  const Result<std::vector<PeerEntry>> entries = team.enter(weight.x, kRows, 0);
  ASSERT_TRUE(entries.ok()) << entries.status().message();
  EXPECT_TRUE(team.failures().empty()) << team.failures()[0];
  ASSERT_EQ(entries->size(), 1u);
  const PeerEntry& entry = (*entries)[0];
  EXPECT_EQ(entry.after, AfterLook::in_rounds);
  EXPECT_EQ(entry.type->activations, "16bit");
  EXPECT_EQ(entry.type->candidate, "the only one");
  EXPECT_LT(entry.type->product_error, 1e-5);
  const Result<std::string> path = team.input_path(weight.x, kRows);
  ASSERT_TRUE(path.ok());
  EXPECT_EQ(team.run(entry, kRows, *path), 123.0);
}

TEST(PeerTeam, AWrongProductOnAGpuIsFound) {
  const test::TempDir dir;
  const Weight weight;
  PeerTeam team({fake(dir, "wrong-on-cuda")}, "cuda", 1, 20);
  // its first element is wrong, and so the column that it is in
  ASSERT_TRUE(team.prepare(weight.all, weight.sample, weight.columns).ok());
  ASSERT_TRUE(team.enter(weight.x, kRows, 0).ok());
  EXPECT_TRUE(team.failures().empty());
  const AwqTensors& all = weight.all;
  const ref::Weights whole = ref::unpack(all.view());
  std::vector<int64_t> every;
  for (int64_t n = 0; n < all.n; ++n) every.push_back(n);
  ASSERT_TRUE(team.prepare(all, whole, every).ok());
  const Result<std::vector<PeerEntry>> entries = team.enter(weight.x, kRows, 0);
  ASSERT_TRUE(entries.ok());
  EXPECT_TRUE(entries->empty());
  ASSERT_EQ(team.failures().size(), 1u);
  EXPECT_NE(team.failures()[0].find("is wrong: relative error"), std::string::npos);
}

TEST(PeerTeam, AWorkerIsForOneKindOfDevice) {
  const test::TempDir dir;
  const PeerTeam cpu({fake(dir, "works-on-cuda")}, "cpu", 1, 20);
  EXPECT_TRUE(cpu.peers().empty());
  ASSERT_EQ(cpu.failures().size(), 1u);
  EXPECT_EQ(cpu.failures()[0], "peer works-on-cuda is for device cuda, this run for cpu");
  const PeerTeam cuda({fake(dir, "works")}, "cuda", 1, 20);
  ASSERT_EQ(cuda.failures().size(), 1u);
  EXPECT_EQ(cuda.failures()[0], "peer works is for device cpu, this run for cuda");
}

// Smaller than what int8 costs where nothing is quantized; more where e4m3 is.
TEST(PeerTeam, ToleranceIsThatOfTheActivations) {
  for (const int64_t k : {128, 4096, 28672}) {
    EXPECT_LT(peer_tolerance(k, "16bit"), peer_tolerance(k, "int8") / 2);
    EXPECT_GT(peer_tolerance(k, "e4m3"), peer_tolerance(k, "int8"));
    EXPECT_EQ(peer_tolerance(k, "int8"), peer_tolerance(k));
  }
}

}  // namespace
}  // namespace nibble::cli
