"""Sharded vocabularies: losses over the ranks of a process group, as processes of this machine."""
