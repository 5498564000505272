#include "body.h"

extern const Table avx512_table = STROP_TABLE;
