"""Paired comparisons over named arms and seeds: the command, its runs, times, statistics, tables and plots."""
