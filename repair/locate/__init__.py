"""Live model and prompt pairs become a map of which modules carry the trigger."""
