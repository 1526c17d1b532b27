"""The web app: Gradio only, one file per tab; reads JSON from job folders, never a model.

Model text is hostile: it is shown in text boxes and plain tables, never as HTML or Markdown.
"""

import os

# Read by Gradio when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
