"""Whether a run fits a card, before any weight is loaded: bytes by part, time, and what to change."""
