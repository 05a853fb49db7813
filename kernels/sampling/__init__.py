"""From logits to a token: penalties, truncation, noise, the choice itself, and the check of drafts against it."""
