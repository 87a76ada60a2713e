"""Search of one's own photographs by sentence or picture: index, query, delete, calibrate."""
