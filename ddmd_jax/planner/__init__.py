"""The cost of a compiled program on a chip, from optimised HLO and a table of chips; no devices."""
