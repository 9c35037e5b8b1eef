// Prompts that a model is known to understand, by its name.

export const EXAMPLES = {
  pocket: [
    "a red heart beats, on a white background",
    "a yellow face blinks, then opens its mouth into a happy smile, on a light blue background",
    "a yellow face in a party hat blows a party horn under falling confetti, on a pink background",
    "a green crocodile snaps its jaws, on a pink background",
    "a blue dolphin leaps, on a brown background",
    "a large red ball bounces in from the left, bounces twice and leaves on the right, on a beach, slowly",
    "a large yellow star grows and bursts, at night, slowly",
    "a small blue fish swims to the right, under water",
  ],
};
