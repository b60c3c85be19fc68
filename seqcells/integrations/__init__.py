"""Support for other frameworks. `import seqcells` imports none of it."""
