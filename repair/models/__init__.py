"""From a name or folder to a live model we may trust: staging, loading, hooks, answers."""
