"""What the writer and the reader of a `SpeculationSpec` must agree on about its methods."""

DRAFT_MODEL_METHODS = frozenset({"draft_model", "hybrid"})  # drafts come from a draft engine, alone or among others
