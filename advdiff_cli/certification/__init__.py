"""Certificates by randomized smoothing: proofs that the vote of a defense withstands every attack of a size."""
