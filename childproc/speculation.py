"""What both ends of a `SpeculationSpec` must hold for true of its methods: who writes the spec and who reads it."""

DRAFT_MODEL_METHODS = frozenset({"draft_model", "hybrid"})  # drafts come from a draft engine, alone or among others
