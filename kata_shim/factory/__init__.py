"""Where sandboxes' machines come from: a ready one, a clone of a template, or a cold boot."""
