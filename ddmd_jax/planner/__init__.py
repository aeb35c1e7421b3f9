"""What a compiled program costs a chip: optimised HLO text and a table of chips, no devices."""
