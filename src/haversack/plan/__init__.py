"""Plans: a readable, versioned file of what was chosen, what it costs and what is predicted."""
