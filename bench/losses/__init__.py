"""The losses beside the cross entropy, each beside what stock has for it."""
