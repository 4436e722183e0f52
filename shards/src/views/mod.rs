//! Draw, then render: crops, colour, blur, jigsaw patches.
