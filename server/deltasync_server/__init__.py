"""The receiving wing: a content-addressed cache, a sequence per workspace, a plain tree."""
