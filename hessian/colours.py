"""Colours that every kind of colour vision tells apart (Okabe & Ito, 2008), and a grey that shows on light and dark."""

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
GREY = "#666666"
