"""What the documents promise, pure: parse and check what a user gave, render what he is shown. No I/O."""
