// Configurations of the slab kernels: valid for every shape, and the measured winners where they
// were measured.
#include <gtest/gtest.h>

#include <algorithm>

#include "gemm/cuda/slab_plan.h"

namespace nibble::cuda {
namespace {

constexpr int kMultiprocessors = 132;
constexpr int64_t kSharedBytes = 227 * 1024;

SlabConfig config_of(int64_t n, int64_t k, int64_t group_size, int64_t m,
                     bool group_scales = false) {
  return slab_config(packed_layout(n, k, group_size), m, group_scales, kMultiprocessors,
                     kSharedBytes);
}

TEST(SlabPlan, EveryConfigurationIsOneThatAKernelTakes) {
  for (const int64_t k : {96, 512, 1536, 4096, 8192, 8704, 14336, 18944, 27648, 53248, 131072}) {
    for (const int64_t n : {8, 16, 1000, 4096, 28672, 57344}) {
      for (const int64_t group_size : {32, 64, 128}) {
        if (k % group_size != 0) continue;
        const PackedLayout layout = packed_layout(n, k, group_size);
        for (int64_t m = 1; m <= kSlabTokens; ++m) {
          for (const bool group_scales : {false, true}) {
            const SlabConfig c =
                slab_config(layout, m, group_scales, kMultiprocessors, kSharedBytes);
            SCOPED_TRACE(c.describe());
            const int columns = slab_token_columns(m);
            EXPECT_GE(c.k_warps, 1);
            EXPECT_LE(c.warps(),
                      c.form == SlabForm::streamed ? slab_streamed_warps(columns) : kSlabWarps);
            EXPECT_TRUE(c.tile_warps == 1 || c.tile_warps == 2 || c.tile_warps == 4);
            EXPECT_GE(c.stages, 1);
            EXPECT_LE(c.stages, kSlabStages);
            EXPECT_GE(c.held_tiles, 1);
            EXPECT_GE(c.blocks, 1);
            EXPECT_LE(slab_shared_bytes(layout, m, group_scales, c), kSharedBytes);
            if (c.form == SlabForm::registers) {
              EXPECT_GE(c.k_warps, layout.slices);
            } else {
              EXPECT_LE(c.k_warps, layout.slices);
            }
            if (c.form == SlabForm::streamed) {
              EXPECT_EQ(c.tile_warps, 1);
            }
          }
        }
      }
    }
  }
}

TEST(SlabPlan, EveryConfigurationOfHalvesIsOneThatAKernelTakes) {
  for (const int64_t k : {96, 512, 1536, 4096, 8192, 8704, 14336, 18944, 27648, 53248, 131072}) {
    for (const int64_t n : {8, 1000, 4096, 57344}) {
      const PackedLayout layout = packed_layout(n, k, 32);
      for (int64_t m = 1; m <= kSlabTokens; ++m) {
        const SlabConfig c = slab_halves_config(layout, m, kMultiprocessors, kSharedBytes);
        SCOPED_TRACE(c.describe());
        EXPECT_TRUE(c.halves);
        EXPECT_GE(c.k_warps, 1);
        EXPECT_LE(c.warps(), slab_halves_warps(slab_token_columns(m, true), c.form));
        EXPECT_GE(c.stages, 1);
        EXPECT_GE(c.held_tiles, 1);
        EXPECT_GE(c.blocks, 1);
        EXPECT_LE(slab_shared_bytes(layout, m, false, c), kSharedBytes);
        if (c.form == SlabForm::registers) {
          EXPECT_EQ(c.k_warps, layout.slices);
        } else {
          EXPECT_LE(c.k_warps, layout.slices);
          EXPECT_EQ(c.tile_warps, 1);
        }
      }
    }
  }
}

// It is that of the product alone, in which bits and shared memory are the same.
TEST(SlabPlan, WhatIsHandedRoundChangesNothingElse) {
  for (const int64_t k : {96, 4096, 8704, 14336, 131072}) {
    for (const int64_t m : {1, 2, 8, 16}) {
      for (const bool group_scales : {false, true}) {
        const PackedLayout layout = packed_layout(4096, k, 32);
        SlabConfig c = slab_handed_config(layout, m, group_scales, kMultiprocessors, kSharedBytes);
        EXPECT_TRUE(c.handed);
        EXPECT_FALSE(c.quantizes);
        EXPECT_NE(c.describe().find("the first quantizing"), std::string::npos);
        EXPECT_LE(slab_shared_bytes(layout, m, group_scales, c), kSharedBytes);
        c.handed = false;
        const SlabConfig alone =
            slab_config(layout, m, group_scales, kMultiprocessors, kSharedBytes);
        EXPECT_EQ(c.describe(), alone.describe());
        EXPECT_EQ(c.k_warps, alone.k_warps);
      }
    }
  }
}

TEST(SlabPlan, EveryQuantizingConfigurationIsOneThatItsKernelsTake) {
  for (const int64_t k : {96, 512, 2048, 4096, 5120, 8192, 8704, 14336, 16384, 16896}) {
    for (const int64_t n : {32, 1024, 4096, 57344}) {
      for (const int64_t group_size : {32, 64, 128}) {
        if (k % group_size != 0) continue;
        const PackedLayout layout = packed_layout(n, k, group_size);
        for (const int64_t m : {1, 2}) {
          for (const bool group_scales : {false, true}) {
            for (const bool gated : {false, true}) {
              const auto c = slab_quantizing_config(layout, m, group_scales, gated,
                                                    kMultiprocessors, kSharedBytes);
              EXPECT_FALSE(c && k > 16384);  // too long a row
              if (!c) continue;
              SCOPED_TRACE(c->describe());
              EXPECT_TRUE(c->quantizes);
              EXPECT_LE(c->warps(), kSlabWarps);
              EXPECT_LE(c->early_warps, c->warps());
              EXPECT_GE(c->stages, 1);
              EXPECT_GE(c->warps() * 32 * slab_row_chunks(*c) * 8, layout.padded_k());
              EXPECT_TRUE(!gated || c->tile_warps % 2 == 0);
              const SlabShared s = slab_shared(layout, m, group_scales, *c);
              const SlabRows rows = slab_rows(layout, m, group_scales, s);
              EXPECT_EQ(s.row_pitch, layout.padded_k());
              EXPECT_GE(rows.scales, s.activations + m * s.row_pitch);
              EXPECT_GE(rows.scratch, rows.scales + (group_scales ? m * (k / group_size) * 4 : 0));
              EXPECT_GE(s.ring, rows.scratch + m * 2 * kSlabRowSums * 4);
              EXPECT_LE(s.total, kSharedBytes);
            }
          }
        }
      }
    }
  }
  // Other sums in another order, and more rows than two, are not for these kernels.
  EXPECT_FALSE(slab_quantizing_config(packed_layout(4096, 4096, 256), 1, true, false,
                                      kMultiprocessors, kSharedBytes));
  EXPECT_FALSE(slab_quantizing_config(packed_layout(4096, 4096, 128), 3, false, false,
                                      kMultiprocessors, kSharedBytes));
}

TEST(SlabPlan, UpTo8192KeepsActivationsInRegisters) {
  const SlabConfig small = config_of(4096, 4096, 128, 1);
  EXPECT_EQ(small.form, SlabForm::registers);
  EXPECT_EQ(small.k_warps, 8);
  EXPECT_EQ(small.stages, 1);
  EXPECT_EQ(small.blocks, 2 * kMultiprocessors);
  const SlabConfig large = config_of(57344, 8192, 128, 16);
  EXPECT_EQ(large.form, SlabForm::registers);
  EXPECT_EQ(large.k_warps, 16);
  EXPECT_EQ(large.blocks, kMultiprocessors);
  EXPECT_EQ(config_of(4096, 1024, 128, 1).tile_warps, 4);
}

TEST(SlabPlan, DeepKStreamsTheActivations) {
  for (const int64_t m : {1, 8, 16}) {
    EXPECT_EQ(config_of(4096, 14336, 128, m).form, SlabForm::streamed) << m;
    EXPECT_EQ(config_of(8192, 28672, 128, m).form, SlabForm::streamed) << m;
  }
}

TEST(SlabPlan, ManyTilesOfFewTokensGoTwoAtATime) {
  EXPECT_EQ(config_of(28672, 4096, 128, 1).tile_warps, 2);
  EXPECT_EQ(config_of(28672, 4096, 128, 1).stages, 2);
  EXPECT_EQ(config_of(28672, 4096, 128, 4).tile_warps, 1);
  EXPECT_EQ(config_of(4096, 4096, 128, 1).tile_warps, 1);
}

TEST(SlabPlan, PartsOfSharedMemoryDoNotOverlap) {
  const PackedLayout layout = packed_layout(4096, 14336, 32);
  for (const SlabForm form : {SlabForm::registers, SlabForm::streamed}) {
    SlabConfig c;
    c.form = form;
    c.k_warps = 7;
    c.tile_warps = form == SlabForm::streamed ? 1 : 2;
    c.stages = 2;
    const SlabShared s = slab_shared(layout, 3, true, c);
    EXPECT_GE(s.partials, kSlabHeaderBytes);
    const int sets = form == SlabForm::streamed ? 1 : 2;
    EXPECT_GE(s.tables, s.partials + sets * s.partials_bytes);
    EXPECT_GE(s.activations, s.tables + int64_t{c.warps()} * s.table_bytes);
    const int64_t rows = form == SlabForm::registers ? 0 : 3 * 7;
    EXPECT_GE(s.ring, s.activations + rows * s.row_pitch);
    EXPECT_EQ(s.total, s.ring + int64_t{c.warps()} * c.stages * layout.slab_bytes);
    for (const int at : {s.partials, s.tables, s.activations, s.row_pitch, s.ring}) {
      EXPECT_EQ(at % 16, 0);
    }
  }
}

TEST(SlabPlan, DescribesItself) {
  EXPECT_EQ(config_of(4096, 4096, 128, 1).describe(),
            "registers, 8x1 warps, ring of 1, 1 held, 264 blocks");
}

}  // namespace
}  // namespace nibble::cuda
