// C API of the backward's pass over dy: from one read of dy [M, N] any of
//   g [M, R] = dy @ b,   db [N, R] = scaling * dy.T @ s,   dbias [N] = dy.sum(0).
// Deterministic; sums in fp32 in a fixed order, each output rounded once. No allocation, no synchronization.
#pragma once

extern "C" {

struct LoraDy {
  const void* dy;      // [M, N], row pitch ld_dy
  const void* b;       // [N, R], row pitch ld_b; read for g only
  const void* s;       // [M, R], contiguous; read for db only
  void* g;             // [M, R], contiguous; null: not wanted
  void* db;            // [N, R], contiguous; null: not wanted
  float* dbias;        // [N]; null: not wanted
  float* workspace;    // lora_dy_workspace bytes on 16 bytes; null where that is 0
  float scaling;
  long long M, N, R;   // N and R multiples of 8, R <= 128
  long long ld_dy, ld_b;  // in elements, multiples of 8; every pointer on 16 bytes
  int dtype;           // of dy, b, s, g and db: 0 bfloat16, 1 float16
  int db_fp32;         // 1: db is float32 instead
};

// How the work is cut. A cluster of `cluster` (1, 2, 4 or 8) CTAs walks the same rows; each CTA owns `chunks` (1 to 4,
// 7 or 8; at most 4 for R > 64) times 64 columns of dy. The rows are cut into at most row_parts parts.
struct LoraDyPlan {
  int cluster, chunks, row_parts;
};

// Each needs the same sizes, outputs and sm_count as the launch.
LoraDyPlan lora_dy_plan(long long M, long long N, long long R, int need_g, int need_db, int need_dbias, int sm_count);
long long lora_dy_workspace(long long M, long long N, long long R, int need_g, int need_db, int need_dbias,
                            int sm_count);

// Enqueues on the stream (a cudaStream_t). Returns 0 or a cudaError_t.
int lora_dy_sm90(const LoraDy* args, int sm_count, void* stream);

// The same with a plan of the caller's, for tuning.
long long lora_dy_workspace_planned(long long M, long long N, long long R, int need_g, int need_db, int need_dbias,
                                    const LoraDyPlan* plan);
int lora_dy_sm90_planned(const LoraDy* args, const LoraDyPlan* plan, void* stream);
}
