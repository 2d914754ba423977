"""Generated questions with known answers, in English and Chinese: no download, no contamination."""
