"""What single instructions cost on a device: the latencies that a model of a step is made of, in cycles.

Each is a chain: every instruction needs the result of the one before. The kernels are CUDA C, compiled by NVRTC, which
comes with PyTorch for CUDA; nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ROWS = "unsigned *q = mem + 4096 + threadIdx.x % 32 / 8 * 32 + threadIdx.x / 32 * 8 + threadIdx.x % 8;"
_STORE_ROWS = 'asm volatile("st.global.u32 [%0], %1;" :: "l"(q + 128 * ((8 * i + {}) & 4095)), "r"(i) : "memory"); '

# name: (threads of a block, what is there before the loop, one link of the chain). x, y, z: unsigned registers that the
# chain goes through; a, d: a thread's address in shared memory; p: its address in global memory (mem).
CHAINS = {
    "block barrier, 4 warps": (128, "", "__syncthreads();"),
    "block barrier, 8 warps": (256, "", "__syncthreads();"),
    "ex2.approx": (32, "", 'asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(f));'),
    "tanh.approx": (32, "", 'asm volatile("tanh.approx.f32 %0, %0;" : "+f"(f));'),
    "ex2.approx, 4 warps": (128, "", 'asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(f));'),
    "fma": (32, "", 'asm volatile("fma.rn.f32 %0, %0, %0, %0;" : "+f"(f));'),
    "mma m16n8k16 bf16": (
        32,
        "",
        'asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, '
        '{%0,%1,%2,%3};" : "+f"(f), "+f"(g), "+f"(h), "+f"(k) : "r"(x));',
    ),
    "mma m16n8k8 tf32": (
        32,
        "",
        'asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, '
        '{%0,%1,%2,%3};" : "+f"(f), "+f"(g), "+f"(h), "+f"(k) : "r"(x));',
    ),
    "ld.shared": (32, "if (threadIdx.x == 0) s[0] = a;", 'asm volatile("ld.shared.u32 %0, [%0];" : "+r"(a));'),
    "ldmatrix.x4": (
        32,
        "",
        'asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), '
        '"=r"(w) : "r"(b)); b = d + x;',
    ),
    "st.shared, barrier, ldmatrix, 4 warps": (
        128,
        "",
        'asm volatile("st.shared.u32 [%0], %1;" :: "r"(d), "r"(x) : "memory"); __syncthreads(); '
        'asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), '
        '"=r"(w) : "r"(b) : "memory"); __syncthreads();',
    ),
    "ld.global from L1": (32, "", 'asm volatile("ld.global.ca.u64 %0, [%0];" : "+l"(p));'),
    "ld.global.cg from L2": (32, "", 'asm volatile("ld.global.cg.u64 %0, [%0];" : "+l"(p));'),
    "ld.acquire.gpu": (32, "", 'asm volatile("ld.acquire.gpu.global.u64 %0, [%0];" : "+l"(p) :: "memory");'),
    "ld.relaxed.gpu": (32, "", 'asm volatile("ld.relaxed.gpu.global.u64 %0, [%0];" : "+l"(p) :: "memory");'),
    "atom.add.acquire": (
        1,
        "",
        'asm volatile("atom.add.acquire.gpu.global.u32 %0, [%1], %2;" : "=r"(x) : "l"(mem + 64), "r"(x) : "memory");',
    ),
    "st.global, fence.acq_rel.gpu": (
        32,
        "",
        'asm volatile("st.global.u32 [%0], %1; fence.acq_rel.gpu;" :: "l"(mem + 64 + threadIdx.x), "r"(i) : "memory");',
    ),
    "st.global, fence.acq_rel.gpu, 4 warps": (
        128,
        "",
        'asm volatile("st.global.u32 [%0], %1; fence.acq_rel.gpu;" :: "l"(mem + 64 + threadIdx.x), "r"(i) : "memory");',
    ),
    "st.global.v4, 4 warps: 2 KB": (
        128,
        "unsigned *q = mem + 4096 + 4 * threadIdx.x;",
        'asm volatile("st.global.v4.u32 [%0], {%1,%1,%1,%1};" :: "l"(q + 512 * (i & 4095)), "r"(i) : "memory");',
    ),
    "st.global.v4, 8 warps: 4 KB": (
        256,
        "unsigned *q = mem + 4096 + 4 * threadIdx.x;",
        'asm volatile("st.global.v4.u32 [%0], {%1,%1,%1,%1};" :: "l"(q + 1024 * (i & 4095)), "r"(i) : "memory");',
    ),
    "st.global.u32, 4 warps: 512 B": (
        128,
        "unsigned *q = mem + 4096 + threadIdx.x;",
        'asm volatile("st.global.u32 [%0], %1;" :: "l"(q + 128 * (i & 4095)), "r"(i) : "memory");',
    ),
    # As a tile is stored: the lanes of a warp cover four rows of 32 bytes, each of another line. Is it the bytes
    # that take time, or the lines? Then whether what comes after such stores waits for them.
    "st.global.u32 in rows of 32 bytes, 4 warps: 512 B": (128, _ROWS, _STORE_ROWS.format(0)),
    "8 of these, 4 warps: 4 KB": (128, _ROWS, "".join(map(_STORE_ROWS.format, range(8)))),
    "8 of these and an ldmatrix.x4": (
        128,
        _ROWS,
        "".join(map(_STORE_ROWS.format, range(8)))
        + 'asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), '
        '"=r"(w) : "r"(b)); b = d + x;',
    ),
    "8 of these and an ld.global.cg": (
        128,
        _ROWS,
        "".join(map(_STORE_ROWS.format, range(8))) + 'asm volatile("ld.global.cg.u64 %0, [%0];" : "+l"(p));',
    ),
    "st.global.v4 and a block barrier, 4 warps: 2 KB": (
        128,
        "unsigned *q = mem + 4096 + 4 * threadIdx.x;",
        'asm volatile("st.global.v4.u32 [%0], {%1,%1,%1,%1};" :: "l"(q + 512 * (i & 4095)), "r"(i) : "memory"); '
        "__syncthreads();",
    ),
    "4 st.global, red.release.gpu": (
        32,
        "",
        'asm volatile("st.global.u32 [%0], %1; st.global.u32 [%0+512], %1; st.global.u32 [%0+1024], %1; '
        'st.global.u32 [%0+1536], %1; red.release.gpu.global.add.u32 [%2], 1;" :: "l"(mem + 64 + threadIdx.x), "r"(i), '
        '"l"(mem + 2048) : "memory");',
    ),
}

_ONE = """
extern "C" __global__ void chain(long long *out, unsigned *mem, int n) {
  __shared__ __align__(16) unsigned s[1024];
  unsigned a, b, d, x = 0, y = 0, z = 0, w = 0;
  float f = 0.25f, g = 0.5f, h = 0.125f, k = 0.75f;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(s));
  d = a + (threadIdx.x % 32) * 16; b = d;
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] = 0;
  __syncthreads();
  SETUP
  unsigned long long p = (unsigned long long)mem;
  __syncthreads();
  long long from = 0;
  for (int again = 0; again < 2; again++) {  // the first round fills the caches
    __syncthreads();
    from = clock64();
#pragma unroll 8
    for (int i = 0; i < n; i++) { LINK }
  }
  long long to = clock64();
  // The sum, so that nothing is left out.
  if (threadIdx.x == 0) { out[0] = to - from; out[1] = (long long)(f + g + h + k) + x + y + z + w + a + b + p; }
}
"""

# One block writes a word, another waits for it and answers: half a round is the way of one value from one processor to
# another. "flag": the data is its own flag. "release, acquire": data, then a flag, as the grid schedule has it.
_PAIR = """
extern "C" __global__ void CLUSTER pair(long long *out, unsigned *mem, int n) {
  volatile unsigned *mine = mem + 32 * (1 + blockIdx.x), *theirs = mem + 32 * (2 - blockIdx.x);
  __shared__ unsigned s[32];
  SETUP
  long long from = clock64();
  for (unsigned i = 1; i <= (unsigned)n; i++) {
    if (blockIdx.x == 0) { SEND WAIT } else { WAIT SEND }
  }
  long long to = clock64();
  if (threadIdx.x == 0 && blockIdx.x == 0) out[0] = to - from;
  DONE
}
"""
_PAIRS = {
    "a word to another processor": (
        "",
        "",
        'asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(mine), "r"(i) : "memory");',
        "{ unsigned v; do { "
        'asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(theirs) : "memory"); } while (v != i); }',
        "",
    ),
    "data and a flag to another processor": (
        "",
        "",
        "mem[512 + 64 * blockIdx.x] = i; "
        'asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(mine) : "memory");',
        "{ unsigned v; do { "
        'asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(theirs) : "memory"); } while (v != i); }',
        "",
    ),
    "a word to a processor of the cluster": (
        "__cluster_dims__(2, 1, 1)",
        "unsigned here, there; "
        'asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(here) : "l"(s)); s[0] = 0; '
        'asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(1 - blockIdx.x)); '
        'asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");',
        'asm volatile("st.relaxed.cluster.shared::cluster.u32 [%0], %1;" :: "r"(there), "r"(i) : "memory");',
        "{ unsigned v; do { "
        'asm volatile("ld.relaxed.cluster.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(here) : "memory"); } '
        "while (v != i); }",
        'asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");',
    ),
}


def sources() -> dict[str, tuple[str, str, int, int, float]]:
    """Of each: CUDA C, the kernel's name, blocks, threads, and how many things a link of the chain is."""
    found: dict[str, tuple[str, str, int, int, float]] = {}
    for name, (threads, setup, link) in CHAINS.items():
        found[name] = (_ONE.replace("SETUP", setup).replace("LINK", link), "chain", 1, threads, 1)
    for name, (cluster, setup, send, wait, done) in _PAIRS.items():
        text = _PAIR.replace("CLUSTER", cluster).replace("SETUP", setup).replace("DONE", done)
        found[name] = (text.replace("SEND", send).replace("WAIT", wait), "pair", 2, 32 if "cluster" in name else 1, 2)
    return found


def cycles(device: torch.device, steps: int = 2000) -> dict[str, Any]:
    """Cycles of each, or why it could not be measured."""
    compiler: Callable[..., Any] | None = getattr(torch.cuda, "_compile_kernel", None)
    if compiler is None:
        return {"left out": f"torch {torch.__version__} has no torch.cuda._compile_kernel"}
    found: dict[str, Any] = {}
    for name, (text, kernel, blocks, threads, per_link) in sources().items():
        out = torch.zeros(2, dtype=torch.int64, device=device)
        mem = torch.zeros(1 << 23, dtype=torch.int32, device=device)
        # What is chased is an address that holds itself, of 64 bits.
        mem[:2] = torch.tensor([mem.data_ptr()], dtype=torch.int64, device=device).view(torch.int32)
        if kernel == "pair":
            mem.zero_()
        try:
            compiled = compiler(text, kernel)
            compiled(grid=(blocks, 1, 1), block=(threads, 1, 1), args=[out, mem, steps])
            torch.cuda.synchronize(device)
            found[name] = out[0].item() / steps / per_link
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found
