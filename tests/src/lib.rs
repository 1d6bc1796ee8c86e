//! Tests of the whole: see `tests/`. There is nothing in the library itself.
