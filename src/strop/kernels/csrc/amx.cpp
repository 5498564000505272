#include "tiles.h"

extern const Tiles amx_tiles = {lay_tiles, tiles};
