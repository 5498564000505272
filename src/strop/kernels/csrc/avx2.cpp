#include "body.h"

extern const Table avx2_table = STROP_TABLE;
