// q, k and v of one attention layer: three weights, x quantized once, a scale per token and group.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "nibble.h"

constexpr int64_t M = 3, K = 512, kGroup = 128, kColumns[] = {512, 128, 128};
struct alignas(64) Line { char bytes[64]; };

static void check(const nibble_status& status) {
  if (status.code == NIBBLE_OK) return;
  std::fprintf(stderr, "error %d: %s\n", status.code, status.message);
  std::exit(1);
}

static nibble_weight* make_weight(int64_t n) {
  std::vector<uint32_t> qweight(K * n / 8);
  for (size_t i = 0; i < qweight.size(); ++i) qweight[i] = 2654435761u * static_cast<uint32_t>(i);
  const std::vector<uint16_t> scales(K / kGroup * n, 0x2000);  // 2^-7 in f16
  nibble_weight_desc desc = {};
  desc.k = K, desc.n = n, desc.group_size = kGroup;
  desc.layout = NIBBLE_AWQ_GEMM, desc.scale_dtype = NIBBLE_F16;
  desc.qweight = qweight.data();  // qzeros stay null: the zero point is 8 everywhere
  desc.scales = scales.data();
  nibble_weight* weight = nullptr;
  check(nibble_weight_create(&weight, &desc, 0));
  return weight;
}

static void multiply(const std::vector<nibble_target>& targets, const std::vector<float>& x) {
  nibble_problem problem = {M,          0,          K,            kGroup, NIBBLE_W4A8,
                            NIBBLE_F32, NIBBLE_F32, NIBBLE_GROUP, 0,      0};
  for (const nibble_target& target : targets) problem.n += nibble_weight_n(target.weight);
  nibble_plan plan;
  check(nibble_gemm_plan(&plan, &problem, nullptr));
  std::vector<Line> workspace((nibble_gemm_workspace_bytes(&plan) + 63) / 64);
  nibble_input input = {};
  input.x = x.data();
  input.x_stride = K;
  const auto count = static_cast<int32_t>(targets.size());
  check(nibble_gemm(&plan, &input, targets.data(), count, workspace.data()));
  std::printf("%d weight(s) by %s\n", count, nibble_plan_kernel(&plan));
}

int main() {
  std::vector<float> x(M * K), together[3], alone[3];
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 37 % 101) / 50.0f - 1.0f;
  std::vector<nibble_target> targets;
  for (int i = 0; i < 3; ++i) {
    together[i].resize(M * kColumns[i]);
    alone[i].resize(M * kColumns[i]);
    targets.push_back({make_weight(kColumns[i]), together[i].data(), kColumns[i]});
  }
  multiply(targets, x);
  for (int i = 0; i < 3; ++i) {
    multiply({{targets[i].weight, alone[i].data(), kColumns[i]}}, x);
    nibble_weight_destroy(const_cast<nibble_weight*>(targets[i].weight));
    if (together[i] != alone[i]) return 1;  // sharing x changes no bit
  }
}
