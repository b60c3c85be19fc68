"""What other frameworks need of seqcells. Nothing here is imported by `import seqcells`."""
