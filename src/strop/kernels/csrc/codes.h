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

// How many of `count` codes of 2 or 4 bits the loops for those widths take: whole vectors, where there are any.
inline int64_t pack_even(const uint8_t *__restrict__ codes, int64_t count, int bits, uint8_t *__restrict__ packed) {
    int64_t done = 0;
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_set1_epi16(bits == 4 ? 0x1001 : 0x0401), fours = _mm512_set1_epi32(0x00100001);
    for (; done + 64 <= count; done += 64) {
        __m512i sums = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + done), pairs);  // code 0 + (code 1 << bits)
        if (bits == 4) _mm256_storeu_si256((__m256i *)(packed + done / 2), _mm512_cvtepi16_epi8(sums));
        else _mm_storeu_si128((__m128i *)(packed + done / 4), _mm512_cvtepi32_epi8(_mm512_madd_epi16(sums, fours)));
    }
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_set1_epi16(bits == 4 ? 0x1001 : 0x0401), fours = _mm256_set1_epi32(0x00100001);
    for (; done + 64 <= count; done += 64) {
        const __m256i *from = (const __m256i *)(codes + done);
        const __m256i one = _mm256_maddubs_epi16(_mm256_loadu_si256(from), pairs);  // code 0 + (code 1 << bits)
        const __m256i other = _mm256_maddubs_epi16(_mm256_loadu_si256(from + 1), pairs);
        if (bits == 4) {
            const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(one, other), 0xD8);
            _mm256_storeu_si256((__m256i *)(packed + done / 2), bytes);
        } else {
            const __m256i words = _mm256_packus_epi32(_mm256_madd_epi16(one, fours), _mm256_madd_epi16(other, fours));
            const __m256i sums = _mm256_permute4x64_epi64(words, 0xD8);
            const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
            _mm_storeu_si128((__m128i *)(packed + done / 4), bytes);
        }
    }
#endif
    if (bits == 4) {
        for (; done + 2 <= count; done += 2) packed[done / 2] = (uint8_t)(codes[done] | codes[done + 1] << 4);
    } else {
        for (; done + 4 <= count; done += 4) {
            const int low = codes[done] | codes[done + 1] << 2, high = codes[done + 2] | codes[done + 3] << 2;
            packed[done / 4] = (uint8_t)(low | high << 4);
        }
    }
    return done;
}

inline int64_t unpack_even(const uint8_t *__restrict__ packed, int64_t count, int bits, uint8_t *__restrict__ codes) {
    int64_t done = 0;
#if defined(__AVX512BW__)
    for (; done + 64 <= count; done += 64) {
        __m512i fields;
        if (bits == 4) {
            __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(packed + done / 2)));
            fields = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
        } else {
            __m512i words = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + done / 4)));
            words = _mm512_or_si512(words, _mm512_slli_epi32(words, 12));
            fields = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi32(words, 6)), _mm512_set1_epi8(3));
        }
        _mm512_storeu_si512(codes + done, fields);
    }
#elif defined(__AVX2__)
    for (; bits == 4 && done + 64 <= count; done += 64) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(packed + done / 2)), mask = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(bytes, mask), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        const __m256i one = _mm256_unpacklo_epi8(low, high), other = _mm256_unpackhi_epi8(low, high);
        __m256i *to = (__m256i *)(codes + done);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(one, other, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(one, other, 0x31));
    }
    for (; bits == 2 && done + 32 <= count; done += 32) {
        __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(packed + done / 4)));
        words = _mm256_or_si256(words, _mm256_slli_epi32(words, 12));
        words = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi32(words, 6)), _mm256_set1_epi8(3));
        _mm256_storeu_si256((__m256i *)(codes + done), words);
    }
#endif
    if (bits == 4) {
        for (; done + 2 <= count; done += 2) {
            codes[done] = packed[done / 2] & 15;
            codes[done + 1] = packed[done / 2] >> 4;
        }
    } else {
        for (; done + 4 <= count; done += 4)
            for (int k = 0; k < 4; k++) codes[done + k] = packed[done / 4] >> 2 * k & 3;
    }
    return done;
}

const int64_t WORDS = 32;  // words of eight codes that are moved together

// `count` codes to bytes as packing.py lays them: code k in the bits k * bits on; the last byte filled with zeros.
void pack_codes(const uint8_t *__restrict__ codes, int64_t count, int bits, uint8_t *__restrict__ packed) {
    int64_t done = 0;
    if (bits == 8) {
        memcpy(packed, codes, (size_t)count);
        return;
    }
    if (bits == 4 || bits == 2) done = pack_even(codes, count, bits, packed);
    uint8_t *out = packed + done * bits / 8;
    const int64_t bytes = (count * bits + 7) / 8;
    uint64_t words[WORDS];
    for (; done + 8 * WORDS + 64 <= count; done += 8 * WORDS) {  // far from the end, whole words can be stored
        memcpy(words, codes + done, sizeof words);
        for (int64_t k = 0; k < WORDS; k++) words[k] = gathered(words[k], bits);
        for (int64_t k = 0; k < WORDS; k++, out += bits) memcpy(out, words + k, 8);
    }
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
    ask_ahead(packed, count * bits / 8);
    if (bits == 8) {
        memcpy(codes, packed, (size_t)count);
        return;
    }
    if (bits == 4 || bits == 2) done = unpack_even(packed, count, bits, codes);
    const uint8_t *in = packed + done * bits / 8;
    const int64_t bytes = (count * bits + 7) / 8;
    uint64_t words[WORDS];
    for (; done + 8 * WORDS + 64 <= count; done += 8 * WORDS) {
        for (int64_t k = 0; k < WORDS; k++, in += bits) memcpy(words + k, in, 8);
        for (int64_t k = 0; k < WORDS; k++) words[k] = spread(words[k], bits);
        memcpy(codes + done, words, sizeof words);
    }
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
#elif defined(STROP_NEON)
    const float32x4_t limit = vdupq_n_f32(most);
    const uint16x8_t places = {1, 2, 4, 8, 16, 32, 64, 128};
    uint16x4_t parts[4];
    for (int k = 0; k < 4; k++) parts[k] = vmovn_u32(vcleq_f32(vld1q_f32(numbers + 4 * k), limit));
    const int low = vaddvq_u16(vandq_u16(vcombine_u16(parts[0], parts[1]), places));
    const int high = vaddvq_u16(vandq_u16(vcombine_u16(parts[2], parts[3]), places));
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
#elif defined(STROP_NEON)
    const uint32x4_t low = {1, 2, 4, 8}, high = {16, 32, 64, 128}, one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    for (; i + 8 <= count; i += 8) {
        const uint32x4_t byte = vdupq_n_u32(mask[i / 8]);
        vst1q_f32(flags + i, vreinterpretq_f32_u32(vandq_u32(vtstq_u32(byte, low), one)));
        vst1q_f32(flags + i + 4, vreinterpretq_f32_u32(vandq_u32(vtstq_u32(byte, high), one)));
    }
#endif
    for (; i < count; i++) flags[i] = (float)(mask[i / 8] >> i % 8 & 1);
}

}  // namespace
