// Codes as bytes, and a bit for each value.
#pragma once

#include "numbers.h"

namespace {

inline uint64_t lower_fields(int width, int bits) {  // every second one, from the lowest on
    const uint64_t field = (1ull << bits) - 1;
    return width == 8 ? field * 0x0001000100010001ull : width == 16 ? field * 0x0000000100000001ull : field;
}

// Fields of a word, `width` apart and `bits` wide, moved together in pairs, and the other way round.
inline uint64_t paired(uint64_t word, int width, int bits) {
    const uint64_t low = lower_fields(width, bits);
    return (word & low) | (word >> (width - bits) & low << bits);
}

inline uint64_t parted(uint64_t word, int width, int bits) {
    const uint64_t low = lower_fields(width, bits);
    return (word & low) | (word & low << bits) << (width - bits);
}

// Eight codes of fewer than 8 bits, one a byte, to the lowest 8 * bits bits, and back.
inline uint64_t gathered(uint64_t word, int bits) {
    return paired(paired(paired(word, 8, bits), 16, 2 * bits), 32, 4 * bits);
}

inline uint64_t spread(uint64_t word, int bits) {
    return parted(parted(parted(word, 32, 4 * bits), 16, 2 * bits), 8, bits);
}

// `count` codes to bytes as packing.py lays them: code k in the bits k * bits on; the last byte filled with zeros.
void pack_codes(const uint8_t *__restrict__ codes, int64_t count, int bits, uint8_t *__restrict__ packed) {
    int64_t done = 0;
    if (bits == 8) {
        memcpy(packed, codes, (size_t)count);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < count / 2; i++) packed[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        done = count / 2 * 2;
    } else if (bits == 2) {
        for (int64_t i = 0; i < count / 4; i++)
            packed[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
        done = count / 4 * 4;
    }
    uint8_t *out = packed + done * bits / 8;
    const int64_t bytes = (count * bits + 7) / 8;
    for (; done < count; done += 8, out += bits) {  // 8 codes are `bits` whole bytes
        uint64_t word = 0;
        if (count - done >= 8) memcpy(&word, codes + done, 8);
        else memcpy(&word, codes + done, (size_t)(count - done));
        word = gathered(word, bits);
        const int64_t room = packed + bytes - out;  // a whole word where it fits: what follows overwrites its zeros
        if (room >= 8) memcpy(out, &word, 8);
        else memcpy(out, &word, (size_t)(room < bits ? room : bits));
    }
}

void unpack_codes(const uint8_t *__restrict__ packed, int64_t count, int bits, uint8_t *__restrict__ codes) {
    int64_t done = 0;
    if (bits == 8) {
        memcpy(codes, packed, (size_t)count);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < count / 2; i++) {
            codes[2 * i] = packed[i] & 15;
            codes[2 * i + 1] = packed[i] >> 4;
        }
        done = count / 2 * 2;
    } else if (bits == 2) {
        for (int64_t i = 0; i < count / 4; i++) {
            codes[4 * i] = packed[i] & 3;
            codes[4 * i + 1] = packed[i] >> 2 & 3;
            codes[4 * i + 2] = packed[i] >> 4 & 3;
            codes[4 * i + 3] = packed[i] >> 6;
        }
        done = count / 4 * 4;
    }
    const uint8_t *in = packed + done * bits / 8;
    const int64_t bytes = (count * bits + 7) / 8;
    for (; done < count; done += 8, in += bits) {
        uint64_t word = 0;
        const int64_t left = packed + bytes - in;
        if (left >= 8) memcpy(&word, in, 8);
        else memcpy(&word, in, (size_t)left);
        word = spread(word, bits);
        if (count - done >= 8) memcpy(codes + done, &word, 8);
        else memcpy(codes + done, &word, (size_t)(count - done));
    }
}

// 16 bits, the first the least significant: which of 16 numbers are at most `most`.
inline uint16_t at_most(const float *numbers, float most) {
#if defined(__AVX512F__)
    return (uint16_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(numbers), _mm512_set1_ps(most), _CMP_LE_OQ);
#elif defined(__AVX2__)
    const __m256 limit = _mm256_set1_ps(most);
    int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers), limit, _CMP_LE_OQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers + 8), limit, _CMP_LE_OQ));
    return (uint16_t)(low | high << 8);
#else
    unsigned bits = 0;
    for (int i = 0; i < 16; i++) bits |= (unsigned)(numbers[i] <= most) << i;
    return (uint16_t)bits;
#endif
}

inline void store_mask(const float *numbers, int64_t count, float most, uint8_t *mask) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        uint16_t bits = at_most(numbers + i, most);
        memcpy(mask + i / 8, &bits, 2);
    }
    for (; i < count; i += 8) {
        unsigned byte = 0;
        for (int64_t k = i; k < count && k < i + 8; k++) byte |= (unsigned)(numbers[k] <= most) << (k - i);
        mask[i / 8] = (uint8_t)byte;
    }
}

// 1.0 for each bit that is set, 0.0 for the others.
inline void load_mask(const uint8_t *mask, int64_t count, float *flags) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
        uint16_t bits;
        memcpy(&bits, mask + i / 8, 2);
        _mm512_storeu_ps(flags + i, _mm512_maskz_mov_ps(bits, _mm512_set1_ps(1.0f)));
    }
#elif defined(__AVX2__)
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (; i + 8 <= count; i += 8) {
        __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask[i / 8]), places), places);
        _mm256_storeu_ps(flags + i, _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(1.0f)));
    }
#endif
    for (; i < count; i++) flags[i] = (float)(mask[i / 8] >> i % 8 & 1);
}

}  // namespace
