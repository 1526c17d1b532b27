"""Before and after become what an engineer can sign."""
