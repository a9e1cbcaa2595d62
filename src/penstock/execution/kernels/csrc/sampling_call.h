// What the kernels of sampling.h are called with; mirrored in kernels/sampling.py.
#pragma once

#include <cstdint>

namespace penstock {

// Tokens and a number for each: how often it is in the output, or what to add to its logit.
struct TokenList {
    const int32_t* ids;
    const float* values;
    int64_t count;
};

// The sampling parameters of one request, with the meaning that execution/sampling/ gives them.
struct SamplingSlot {
    double top_p;  // 1: off
    double min_p;  // 0: off
    int64_t top_k;  // at least the vocabulary's size: off
    int64_t key;  // of its random numbers, see execution/sampling/random.py
    int64_t end_position;  // before it the stop tokens are forbidden
    TokenList used;  // tokens of prompt and output, with their number in the output; empty without penalties
    TokenList biased;
    TokenList stops;  // values unused
    float temperature;  // 0: the largest logit
    float presence, frequency, repetition;
    int32_t only_biased;  // 1: all tokens but the biased ones are forbidden
    int32_t unused;
};

// One token for each of `rows` rows of logits, which may be overwritten.
struct SampleCall {
    float* logits;  // [rows, stride]
    int64_t stride;
    int64_t vocab_size;
    int64_t rows;
    const SamplingSlot* slots;  // all of them
    const int64_t* slot_of_row;
    const int64_t* positions;  // of the tokens that are sampled
    int64_t* token_ids;  // out
    uint8_t* failed;  // out: 1 where there is no distribution; its token is 0
};

// Minus infinity for the tokens that masks do not allow, in `rows` rows of logits.
struct MaskCall {
    float* logits;  // [any number, stride]
    int64_t stride;
    int64_t vocab_size;
    int64_t rows;
    const int64_t* logit_rows;  // [rows]: which of them, distinct
    const uint8_t* bits;  // [rows, mask_bytes]: token v is allowed where bit v % 8 of byte v / 8 is set
    int64_t mask_bytes;  // vocab_size / 8, rounded up
};

// Log-probabilities of one token and of the most likely ones in each of `rows` rows of logits.
struct LogprobCall {
    const float* logits;  // [any number, stride]
    const int64_t* logit_rows;  // [rows]: which of them; null: the first ones
    int64_t stride;
    int64_t vocab_size;
    int64_t rows;
    const int64_t* token_ids;
    int64_t num_top;  // at most vocab_size
    float* logprobs;  // out [rows]
    int64_t* ranks;  // out [rows]: 1 + tokens that are strictly more likely
    int64_t* top_ids;  // out [rows, num_top]
    float* top_logprobs;  // out [rows, num_top]
};

}  // namespace penstock
