// ldmatrix, stmatrix and mma.sync.
//
// Products of halves are exact in fp32; mma adds them to the accumulator one by one in the order of
// k, each sum rounded to nearest. The hardware's order and its rounding are unspecified. Sums that
// PTX keeps in f16 are rounded once, at the end.
#include "conversions.h"
#include "memory.h"
#include "warps.h"

namespace ptx {

namespace {

struct MatrixRequest : Request {
  u64 address;
  u32 count;
  bool transposed;
  u32* out;
  const u32* in;
};
struct ProductRequest : Request {
  const u32 *a, *b, *c;
  u32* d;
};
struct DoubleProductRequest : Request {
  const u64 *a, *b, *c;
  u64* d;
};

template <class R>
R& as(Request** lanes, u32 lane) {
  return *static_cast<R*>(lanes[lane]);
}

// Generic addresses come here too, as 64 bits.
u64 shared_address(u64 address) {
  return address - shared_window < window_bytes ? address - shared_window : address;
}

// Lane 8·m + r holds the address of row r of matrix m; each row is 16 bytes. Lane i receives the
// elements (i / 4, 2·(i % 4)) and the next one, of the transposed matrix where that is asked for.
void load(Request** lanes, u32, Fiber& last) {
  const auto& any = as<MatrixRequest>(lanes, 0);
  Fiber* const first = &machine.fibers[32 * last.warp];
  u16 matrix[8][8];
  for (u32 m = 0; m < any.count; ++m) {
    for (u32 row = 0; row < 8; ++row) {
      const u32 lane = 8 * m + row;
      const auto& r = as<MatrixRequest>(lanes, lane);
      memcpy(matrix[row], read_shared(first[lane], shared_address(r.address), 16, r.line, plain),
             16);
    }
    for (u32 lane = 0; lane < 32; ++lane) {
      const u32 row = lane / 4, column = 2 * (lane % 4);
      const u16 low = any.transposed ? matrix[column][row] : matrix[row][column];
      const u16 high = any.transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      as<MatrixRequest>(lanes, lane).out[m] = u32(high) << 16 | low;
    }
  }
}

void store(Request** lanes, u32, Fiber& last) {
  const auto& any = as<MatrixRequest>(lanes, 0);
  Fiber* const first = &machine.fibers[32 * last.warp];
  u16 matrix[8][8];
  for (u32 m = 0; m < any.count; ++m) {
    for (u32 lane = 0; lane < 32; ++lane) {
      const u32 row = lane / 4, column = 2 * (lane % 4),
                word = as<MatrixRequest>(lanes, lane).in[m];
      (any.transposed ? matrix[column][row] : matrix[row][column]) = u16(word);
      (any.transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = u16(word >> 16);
    }
    for (u32 row = 0; row < 8; ++row) {
      const u32 lane = 8 * m + row;
      const auto& r = as<MatrixRequest>(lanes, lane);
      const u8* data = reinterpret_cast<const u8*>(matrix[row]);
      memcpy(write_shared(first[lane], shared_address(r.address), 16, r.line, plain, data), data,
             16);
    }
  }
}

template <Element E>
f32 element(const u32* words, u32 index) {
  if (E == element_tf32) return bit_cast<f32>(words[index] & 0xffffe000u);
  const u16 bits = u16(words[index / 2] >> (16 * (index & 1)));
  return E == element_f16 ? wide(f16{bits}) : wide(bf16{bits});
}

// The fragments of m16n8kK: group = lane / 4, place = lane % 4. With 16-bit elements A's register
// j holds row group + 8·(j % 2), columns 2·place + {0, 1} + 8·(j / 2); with tf32 one element of
// column place + 4·(j / 2). B likewise, with its rows as A's columns.
template <Element E, u32 K>
void multiply(Request** lanes, bool half_sums) {
  constexpr u32 each = E == element_tf32 ? 1 : 2;  // elements of a register
  constexpr u32 step = 4 * each;                   // columns that four lanes hold
  f32 a[16][K], b[K][8], sums[16][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const auto& r = as<ProductRequest>(lanes, lane);
    const u32 group = lane / 4, place = lane % 4;
    for (u32 part = 0; part < K / step; ++part)
      for (u32 i = 0; i < each; ++i) {
        const u32 k = part * step + place * each + i;
        a[group][k] = element<E>(r.a, each * (2 * part) + i);
        a[group + 8][k] = element<E>(r.a, each * (2 * part + 1) + i);
        b[k][group] = element<E>(r.b, each * part + i);
      }
    for (u32 i = 0; i < 4; ++i)
      sums[group + 8 * (i / 2)][2 * place + i % 2] =
          half_sums ? wide(f16{u16(r.c[i / 2] >> (16 * (i & 1)))}) : bit_cast<f32>(r.c[i]);
  }
  for (u32 row = 0; row < 16; ++row)
    for (u32 k = 0; k < K; ++k)
      for (u32 column = 0; column < 8; ++column)
        sums[row][column] = fused(a[row][k], b[k][column], sums[row][column]);
  for (u32 lane = 0; lane < 32; ++lane) {
    auto& r = as<ProductRequest>(lanes, lane);
    const u32 group = lane / 4, place = lane % 4;
    for (u32 half = 0; half < 2; ++half) {
      const f32 *row = sums[group + 8 * half], low = row[2 * place], high = row[2 * place + 1];
      if (half_sums) {
        r.d[half] = nearest<f16>(low).bits | u32(nearest<f16>(high).bits) << 16;
      } else {
        r.d[2 * half] = bit_cast<u32>(low), r.d[2 * half + 1] = bit_cast<u32>(high);
      }
    }
  }
}

template <Element E, u32 K>
void multiply_singles(Request** lanes, u32, Fiber&) {
  multiply<E, K>(lanes, false);
}
template <u32 K>
void multiply_halves(Request** lanes, u32, Fiber&) {
  multiply<element_f16, K>(lanes, true);
}

// f64: A's register j holds row group + 8·(j % (M / 8)), column place + 4·(j / (M / 8)).
template <u32 M, u32 K>
void multiply_doubles(Request** lanes, u32, Fiber&) {
  f64 a[M][K], b[K][8], sums[M][8];
  for (u32 lane = 0; lane < 32; ++lane) {
    const auto& r = as<DoubleProductRequest>(lanes, lane);
    const u32 group = lane / 4, place = lane % 4;
    for (u32 part = 0; part < K / 4; ++part) {
      for (u32 half = 0; half < M / 8; ++half)
        a[group + 8 * half][4 * part + place] = bit_cast<f64>(r.a[part * (M / 8) + half]);
      b[4 * part + place][group] = bit_cast<f64>(r.b[part]);
    }
    for (u32 i = 0; i < M / 4; ++i)
      sums[group + 8 * (i / 2)][2 * place + i % 2] = bit_cast<f64>(r.c[i]);
  }
  for (u32 row = 0; row < M; ++row)
    for (u32 k = 0; k < K; ++k)
      for (u32 column = 0; column < 8; ++column)
        sums[row][column] = fused(a[row][k], b[k][column], sums[row][column]);
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 i = 0; i < M / 4; ++i)
      as<DoubleProductRequest>(lanes, lane).d[i] =
          bit_cast<u64>(sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
}

}  // namespace

void load_matrices(Thread& t, u64 address, u32 count, bool transposed, u32* out, u32 line) {
  MatrixRequest request{
      {kind_of(kind_load_matrices, 0), ~0u, line, true}, address, count, transposed, out, nullptr};
  meet(fiber(t), request, load);
}

void store_matrices(Thread& t, u64 address, u32 count, bool transposed, const u32* in, u32 line) {
  MatrixRequest request{
      {kind_of(kind_store_matrices, 0), ~0u, line, true}, address, count, transposed, nullptr, in};
  meet(fiber(t), request, store);
}

void multiply_matrices(Thread& t, Element element, u32 k, bool half_sums, const u32* a,
                       const u32* b, const u32* c, u32* d, u32 line) {
  ProductRequest request{{kind_of(kind_multiply, 0), ~0u, line, true}, a, b, c, d};
  auto compute =
      element == element_bf16
          ? k == 8 ? multiply_singles<element_bf16, 8> : multiply_singles<element_bf16, 16>
      : element == element_tf32
          ? k == 4 ? multiply_singles<element_tf32, 4> : multiply_singles<element_tf32, 8>
      : half_sums ? k == 8 ? multiply_halves<8> : multiply_halves<16>
      : k == 8    ? multiply_singles<element_f16, 8>
                  : multiply_singles<element_f16, 16>;
  meet(fiber(t), request, compute);
}

void multiply_matrices_f64(Thread& t, u32 m, u32 k, const u64* a, const u64* b, const u64* c,
                           u64* d, u32 line) {
  DoubleProductRequest request{{kind_of(kind_multiply, 1), ~0u, line, true}, a, b, c, d};
  auto compute = m == 8   ? multiply_doubles<8, 4>
                 : k == 4 ? multiply_doubles<16, 4>
                 : k == 8 ? multiply_doubles<16, 8>
                          : multiply_doubles<16, 16>;
  meet(fiber(t), request, compute);
}

}  // namespace ptx
