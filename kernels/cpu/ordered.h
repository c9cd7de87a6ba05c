// Sums and exponentials with the same bits on every processor.
//
// The kernels are compiled with leave to reorder sums and to fuse a product and a sum, which gives each
// processor, and each loop that the compiler unrolls in its own way, bits of its own. MOSS_ORDERED takes
// that leave away from the functions up to MOSS_ORDERED_END; the ones here keep their promise where they are
// used between the two, since a function follows the rules of the one into which it is inlined.
// Sums run in eight lanes whatever the registers hold.
#pragma once
#include "numbers.h"

#define MOSS_ORDERED \
    _Pragma("GCC push_options") \
    _Pragma("GCC optimize(\"no-associative-math\", \"no-reciprocal-math\", \"signed-zeros\", \"fp-contract=off\")")
#define MOSS_ORDERED_END _Pragma("GCC pop_options")

namespace moss {

MOSS_ORDERED

MOSS_FORCED float sum_lanes(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// sum_lanes of eight vectors: lane i is that of vector i.
MOSS_FORCED f32x8 sum_each(const f32x8 (&v)[8]) {
    const i32x8 low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
    const i32x8 front = {0, 1, 8, 9, 4, 5, 12, 13}, back = {2, 3, 10, 11, 6, 7, 14, 15};
    const i32x8 even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};
    f32x8 four[4], two[2];
    for (int i = 0; i < 4; i++)
        four[i] = __builtin_shuffle(v[i], v[i + 4], low) + __builtin_shuffle(v[i], v[i + 4], high);
    for (int i = 0; i < 2; i++)
        two[i] = __builtin_shuffle(four[2 * i], four[2 * i + 1], front) +
                 __builtin_shuffle(four[2 * i], four[2 * i + 1], back);
    return __builtin_shuffle(two[0], two[1], even) + __builtin_shuffle(two[0], two[1], odd);
}

// The larger of each lane; where one of them is NaN, b.
MOSS_FORCED f32x8 max8(f32x8 a, f32x8 b) { return a > b ? a : b; }

// e^x for x <= 0, off by less than two units in the last place; 0 from -105 on, NaN for NaN.
MOSS_FORCED f32x8 exp8(f32x8 x) {
    x = x < splat8(-105.0f) ? splat8(-105.0f) : x;
    const f32x8 shift = splat8(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const f32x8 whole = (x * splat8(1.44269504f) + shift) - shift;
    const f32x8 r = (x - whole * splat8(0.693359375f)) - whole * splat8(-2.12194440e-4f);  // ln 2 in two parts
    f32x8 p = splat8(1.98756912e-4f);
    p = p * r + splat8(1.39819994e-3f);
    p = p * r + splat8(8.33345205e-3f);
    p = p * r + splat8(4.16657962e-2f);
    p = p * r + splat8(1.66666657e-1f);
    p = p * r + splat8(0.5f);
    p = (p * (r * r) + r) + splat8(1.0f);
    // 2^whole in two factors, since the result may be subnormal
    const i32x8 power = __builtin_convertvector(whole, i32x8), half = power >> 1;
    const f32x8 one = (f32x8)((half + 127) << 23), other = (f32x8)((power - half + 127) << 23);
    return (p * one) * other;
}

MOSS_ORDERED_END

}  // namespace moss
